// Engram: rows of a table, found by hashing the last tokens, are added to the residual as far as a gate opens.

#pragma once
#include "streams.h"

// A token that rows are read for: `offset` tokens behind the first row of its sequence, or before it.
struct Place {
    int64_t sequence, offset;
};

struct Engram : Streams {
    using Streams::Streams;

    std::vector<Place> places;      // the rows of a pass, then the tokens before them that convolutions look at
    std::vector<int64_t> earlier;   // [sequences, span]: which of `places` is 1, 2, ... tokens before the first row
    std::vector<int64_t> addresses;  // [places, layers, reads]: rows of the table
    std::vector<Buffer> found;      // of every layer: [places, what is read for a token]
    Array<float> keys, values, power, opened;  // power: the mean square of every value; opened [rows, streams]: gates
    // tokens that a convolution looks back; rows of the table for a token and layer; bytes of a row without its scale
    int64_t span, reads, row_bytes;

    void prepare(const Batch& b, int64_t threads) {
        Streams::prepare(b, threads);
        const Memory& w = m.memory;
        if (!w.layers) return;
        span = gate_floats ? (w.taps - 1) * w.grams : 0, reads = (w.grams - 1) * w.heads;
        row_bytes = w.width * (w.kind == FLOAT32 ? 4 : w.kind == BFLOAT16 ? 2 : 1);
        places.clear(), earlier.assign(b.sequences * span, -1);
        for (int64_t r = 0; r < b.rows; ++r) places.push_back({row_sequence[r], r - b.starts[row_sequence[r]]});
        for (int64_t s = 0; s < b.sequences; ++s)
            for (int64_t back = 1; back <= std::min(span, b.positions[s]); ++back)
                if (whole(back, w.grams) - back < b.starts[s + 1] - b.starts[s]) {  // a row is taps apart from it
                    earlier[s * span + back - 1] = places.size();
                    places.push_back({s, -back});
                }
        const int64_t count = places.size();
        addresses.resize(count * w.layers * reads), found.resize(w.layers);
        for (Buffer& one : found) one.fit(count, reads * w.width);
        auto fit = [](auto& v, int64_t size) {
            if (v.size() < (size_t)size) v.resize(size);
        };
        fit(keys, b.rows * m.streams * m.hidden), fit(values, count * m.hidden), fit(power, count);
        fit(opened, b.rows * m.streams);
    }

    // Which rows the places [begin, end) read, in every layer; asked for at once, for memory answers late.
    void find(const Batch& b, int64_t begin, int64_t end) {
        const Memory& w = m.memory;
        for (int64_t i = begin; i < end; ++i) {
            int64_t* to = addresses.data() + i * w.layers * reads;
            for (int64_t l = 0; l < w.layers; ++l) {
                int64_t mixed = token(b, places[i], 0) * w.multipliers[l * w.grams];
                for (int64_t n = 1; n < w.grams; ++n) {
                    mixed ^= token(b, places[i], n) * w.multipliers[l * w.grams + n];
                    for (int64_t k = 0; k < w.heads; ++k) {
                        const int64_t head = (l * (w.grams - 1) + n - 1) * w.heads + k;
                        *to = mixed % w.primes[head] + w.offsets[head];
                        const char* row = (const char*)w.rows + *to++ * row_bytes;
                        for (int64_t at = 0; at < row_bytes; at += 64) __builtin_prefetch(row + at);
                        if (w.scales) __builtin_prefetch(w.scales + to[-1]);
                    }
                }
            }
        }
    }

    // The compressed token `back` tokens before a place; the pad where the document has not begun.
    int64_t token(const Batch& b, const Place& place, int64_t back) const {
        const int64_t s = place.sequence, at = place.offset - back;
        if (b.positions[s] + at < 0) return m.memory.pad;
        return m.memory.compressed[at < 0 ? b.before[(s + 1) * m.memory.reach + at] : b.tokens[b.starts[s] + at]];
    }

    void gather(int64_t begin, int64_t end) {
        const Memory& w = m.memory;
        for (int64_t i = begin; i < end; ++i)
            for (int64_t l = 0; l < w.layers; ++l) {
                for (int64_t k = 0; k < reads; ++k)
                    read_row(found[l].row(i) + k * w.width, addresses[(i * w.layers + l) * reads + k]);
                if (w.rounded) round_row(found[l].rows, i);
            }
    }

    void read_row(float* out, int64_t row) const {
        const Memory& w = m.memory;
        const char* from = (const char*)w.rows + row * row_bytes;
        if (w.kind == FLOAT32) std::memcpy(out, from, w.width * sizeof(float));
        else if (w.kind == BFLOAT16)
            for (int64_t i = 0; i < w.width; i += LANES) {
                const int64_t left = std::min(LANES, w.width - i);
                store_some(out + i, widen_some((const uint16_t*)from + i, left), left);
            }
        else
            for (int64_t i = 0; i < w.width; ++i) out[i] = ((const int8_t*)from)[i] * w.scales[row];
    }

    // What this thread's share of the places reads, a few at a time: while some are gathered the next are on their way.
    void look_up(const Team& t, const Batch& b) {
        const int64_t together = 16;
        int64_t begin, end;
        t.share(places.size(), begin, end);
        find(b, begin, std::min(end, begin + together));
        for (; begin < end; begin += together) {
            find(b, std::min(end, begin + together), std::min(end, begin + 2 * together));
            gather(begin, std::min(end, begin + together));
        }
    }

    float* gates_of(int64_t sequence, int64_t position, int64_t index, const Batch& b) const {
        float* page = cache(sequence, position / PAGE, m.layers + m.modules, b);  // behind the last layer
        return page + (index * PAGE + position % PAGE) * m.streams;
    }

    // How far stream x opens for key k.
    float gate(const float* x, const float* k, const float* weight) const {
        Vec both{}, of_x{}, of_k{};
        for (int64_t i = 0; i < m.hidden; i += LANES) {
            const int64_t left = std::min(LANES, m.hidden - i);
            const Vec a = load_some(x + i, left), c = load_some(k + i, left);
            both += a * load_some(weight + i, left) * c, of_x += a * a, of_k += c * c;
        }
        const float eps = m.norm_eps, d = m.hidden;
        const float score = sum(both) / std::sqrt((sum(of_x) / d + eps) * (sum(of_k) / d + eps) * d);
        const float root = std::sqrt(std::max(std::abs(score), 1e-6f));
        return 1 / (1 + std::exp(score > 0 ? -root : score < 0 ? root : 0.0f));
    }

    // Add to the residual of rows [begin, end) what layer `w` makes of the rows of the table that they found.
    void recall(const Team& t, const Batch& b, const Recall& w, int64_t begin, int64_t end) {
        const int64_t n = m.streams, wide = n * m.hidden, count = places.size();
        multiply(t, w.key, found[w.index].rows, b.rows, keys.data(), wide);
        multiply(t, w.value, found[w.index].rows, count, values.data(), m.hidden);
        t.wait();
        for (int64_t r = begin; r < end; ++r) {
            float *gates = opened.data() + r * n, total = 0;
            for (int64_t i = 0; i < n; ++i) {
                const int64_t at = i * m.hidden;
                total += gates[i] = gate(streams_of(r) + at, keys.data() + r * wide + at, w.gate_norm + at);
            }
            if (span)
                std::memcpy(gates_of(row_sequence[r], row_position[r], w.index, b), gates, n * sizeof(float));
            b.gates[r] += total / (n * m.memory.layers);
        }
        int64_t from, to;
        t.share(count, from, to);
        for (int64_t i = from; i < to; ++i) {
            const float* value = values.data() + i * m.hidden;
            power[i] = dot(value, value, m.hidden) / m.hidden;
        }
        t.wait();
        for (int64_t r = begin; r < end; ++r)
            for (int64_t i = 0; i < n; ++i) add_value(b, w, r, i);
    }

    // u + SiLU(conv(norm(u))) for u = gate * value, to one stream of a row.
    void add_value(const Batch& b, const Recall& w, int64_t r, int64_t stream) {
        const float *value[MOST_TAPS], *kernel[MOST_TAPS], gate = opened[r * m.streams + stream];
        float factor[MOST_TAPS], *x = streams_of(r) + stream * m.hidden;
        const int64_t s = row_sequence[r], taps = m.memory.taps;
        int64_t used = 0;
        for (int64_t tap = 0; tap < taps; ++tap) {  // the last is the row's own
            const int64_t position = row_position[r] - (taps - 1 - tap) * m.memory.grams;
            if (position < 0) continue;
            const int64_t offset = position - b.positions[s],
                          place = offset < 0 ? earlier[s * span - offset - 1] : b.starts[s] + offset;
            const float open = position == row_position[r] ? gate : gates_of(s, position, w.index, b)[stream];
            factor[used] = open / std::sqrt(open * open * power[place] + (float)m.norm_eps);
            value[used] = values.data() + place * m.hidden;
            kernel[used++] = w.conv + (stream * taps + tap) * m.hidden;
        }
        for (int64_t i = 0; i < m.hidden; i += LANES) {
            const int64_t left = std::min(LANES, m.hidden - i);
            Vec mixed{};
            for (int64_t k = 0; k < used; ++k)
                mixed += load_some(value[k] + i, left) * factor[k] * load_some(kernel[k] + i, left);
            const Vec own = load_some(values.data() + r * m.hidden + i, left) * gate;
            store_some(x + i, load_some(x + i, left) + own + mixed / (exponential(-mixed) + 1.0f), left);
        }
    }
};
