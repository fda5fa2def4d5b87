// Hyper-connections: a row's residual is several streams, of which each part of a layer reads one mixture, and to all of
// which it writes. With one stream they are the plain residual. Twin: model/hyper_connections.py.

#pragma once
#include "feed_forward.h"

struct Streams : FeedForward {
    using FeedForward::FeedForward;

    Array<float> streams, coefficients;  // [rows, streams, hidden]; [rows, pre, post and comb of the part that runs]

    void prepare(const Batch& b, int64_t threads) {
        FeedForward::prepare(b, threads);
        const int64_t n = m.streams;
        if (n == 1) return;
        if (streams.size() < (size_t)(b.rows * n * m.hidden)) streams.resize(b.rows * n * m.hidden);
        if (coefficients.size() < (size_t)(b.rows * (2 + n) * n)) coefficients.resize(b.rows * (2 + n) * n);
    }

    // Where a row's streams are.
    float* streams_of(int64_t r) {
        return m.streams == 1 ? residual.data() + r * m.hidden : streams.data() + r * m.streams * m.hidden;
    }

    void enter(int64_t begin, int64_t end) {  // every stream begins as the residual
        for (int64_t r = begin; m.streams > 1 && r < end; ++r)
            for (int64_t i = 0; i < m.streams; ++i)
                std::memcpy(streams_of(r) + i * m.hidden, residual.data() + r * m.hidden, m.hidden * sizeof(float));
    }

    void leave(int64_t r, const Mixer& w) {  // the residual becomes a mixture of the streams
        if (m.streams == 1) return;
        float raw[MOST_STREAMS];
        project(r, r + 1, w, m.streams, raw);
        for (int64_t i = 0; i < m.streams; ++i) raw[i] = sigmoid(w.scale[0] * raw[i] + w.base[i]) + (float)m.lift;
        mix(residual.data() + r * m.hidden, raw, streams_of(r));
    }

    // What a part of a layer reads, normed; what it computes is to be added to the residual, for `write` to share out.
    void read(const Mixer& w, const float* norm, bool rounded, int64_t begin, int64_t end) {
        const int64_t n = m.streams, count = (2 + n) * n;
        if (n > 1) project(begin, end, w, count, coefficients.data() + begin * count);
        for (int64_t r = begin; r < end; ++r) {
            float* x = residual.data() + r * m.hidden;
            if (n > 1) {
                map(coefficients.data() + r * count, w);
                mix(x, coefficients.data() + r * count, streams_of(r));
            }
            norm_row(normed, r, x, norm, m.hidden, m.norm_eps, rounded);
            if (n > 1) std::fill(x, x + m.hidden, 0.0f);
        }
    }

    void write(int64_t begin, int64_t end) {
        for (int64_t r = begin; m.streams > 1 && r < end; ++r) m.streams == 4 ? write_row<4>(r) : write_row<0>(r);
    }

    template <int Fixed>
    void write_row(int64_t r) {
        const int64_t n = Fixed ? Fixed : m.streams;
        const float *post = coefficients.data() + r * (2 + n) * n + n, *comb = post + n,
                    *out = residual.data() + r * m.hidden;
        float* x = streams_of(r);
        for (int64_t k = 0; k < m.hidden; k += LANES) {
            const int64_t left = std::min(LANES, m.hidden - k);
            Vec old[Fixed ? Fixed : MOST_STREAMS], added = load_some(out + k, left);
            for (int64_t j = 0; j < n; ++j) old[j] = load_some(x + j * m.hidden + k, left);
            for (int64_t i = 0; i < n; ++i) {
                Vec total = post[i] * added;
                for (int64_t j = 0; j < n; ++j) total += comb[i * n + j] * old[j];
                store_some(x + i * m.hidden + k, total, left);
            }
        }
    }

    // raw [rows, count] = fn . the normed streams
    void project(int64_t begin, int64_t end, const Mixer& w, int64_t count, float* raw) {
        const int64_t wide = m.streams * m.hidden;
        Rows rows{};
        rows.x = streams_of(begin), rows.width = wide;
        if (begin < end) product(w.fn, rows, end - begin, raw, count, false, 0, count);
        for (int64_t r = begin; r < end; ++r, raw += count) {
            const float* x = streams_of(r);
            const float by = 1 / std::sqrt(dot(x, x, wide) / wide + (float)m.norm_eps);
            for (int64_t i = 0; i < count; ++i) raw[i] *= by;
        }
    }

    // The coefficients of a row in place of what was projected.
    void map(float* raw, const Mixer& w) const {
        const int64_t n = m.streams;
        float comb[MOST_STREAMS * MOST_STREAMS];
        for (int64_t i = 0; i < (2 + n) * n; ++i) {
            const int64_t part = std::min<int64_t>(i / n, 2), k = i - 2 * n;
            const float x = w.scale[part] * (m.constrained ? raw[i] : std::tanh(raw[i])) + w.base[i];
            if (part == 2) comb[m.transposed ? k % n * n + k / n : k] = x;
            else raw[i] = !m.constrained ? x : part ? 2 * sigmoid(x) : sigmoid(x) + (float)m.lift;
        }
        if (m.constrained) n == 4 ? sinkhorn<4>(comb) : sinkhorn<0>(comb);
        std::memcpy(raw + 2 * n, comb, n * n * sizeof(float));
    }

    // From logits to a matrix whose rows sum to 1, and columns nearly: a softmax over columns, then rows and columns in
    // turn. A row's lanes behind the last stream stay zero. Fixed: the number of streams, or 0 for any.
    template <int Fixed>
    void sinkhorn(float* comb) const {
        const int64_t n = Fixed ? Fixed : m.streams;
        const IVec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, real = lane < (int32_t)n;
        const Vec lift = splat(m.lift), least = splat(m.least), one = splat(1);
        Vec row[Fixed ? Fixed : MOST_STREAMS], top = splat(-INFINITY), total{};
        auto columns = [&] {
            total = row[0];
            for (int64_t i = 1; i < n; ++i) total += row[i];
        };
        for (int64_t i = 0; i < n; ++i) top = larger(top, row[i] = load_some(comb + i * n, n));
        for (int64_t i = 0; i < n; ++i) row[i] = pick(real, exponential(row[i] - top), Vec{});
        columns();
        for (int64_t i = 0; i < n; ++i) row[i] = pick(real, larger(row[i] / total, least) + lift, Vec{});
        for (int64_t round = 0; round < m.rounds; ++round) {
            if (round) {
                columns();
                const Vec off = pick(real, larger(total - one, one - total), Vec{});
                if (m.tolerance && largest(off) <= (float)m.tolerance) break;
                const Vec by = pick(real, one / (total + lift), Vec{});
                for (int64_t i = 0; i < n; ++i) row[i] *= by;
            }
            if constexpr (Fixed == 4) {
                const Vec4 by = 1.0f / (sums(row[0], row[1], row[2], row[3]) + (float)m.lift);
                for (int i = 0; i < 4; ++i) row[i] *= by[i];
            } else
                for (int64_t i = 0; i < n; ++i) row[i] *= 1 / (sum(row[i]) + (float)m.lift);
        }
        for (int64_t i = 0; i < n; ++i) store_some(comb + i * n, row[i], n);
    }

    // out = sum of weights times streams
    void mix(float* out, const float* weights, const float* x) const {
        for (int64_t k = 0; k < m.hidden; k += LANES) {
            const int64_t left = std::min(LANES, m.hidden - k);
            Vec total{};
            for (int64_t j = 0; j < m.streams; ++j) total += weights[j] * load_some(x + j * m.hidden + k, left);
            store_some(out + k, total, left);
        }
    }

    static float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }
};
