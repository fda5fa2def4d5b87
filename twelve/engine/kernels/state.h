// What a pass works on: the pages, the activations of every row, and how the work is cut up.

#pragma once
#include <memory>
#include "model.h"
#include "team.h"

struct State {
    Model m;
    float *pool = nullptr, *bounds = nullptr;  // bounds: what `select` looks at, null without selection
    double share = 1;                          // of a long past's pages that are read
    int64_t page_floats, layer_floats, gate_floats, bound_floats, entry, head_size, query_size, kv_size;
    std::atomic<int64_t> pages_read{0}, pages_past{0};

    Buffer normed, low, mixed, inner, gathered, expert_inner, last, joined;
    Array<float> residual, query, kv, absorbed, latent_mixed, both, expert_both, expert_out, cosines, sines, hidden,
        logits, gates;
    std::vector<int64_t> row_sequence, row_position, chosen, slot, expert_start, expert_count;
    std::vector<Unit> units;
    std::vector<std::pair<int64_t, int64_t>> filled;  // (sequence, page) that this pass completes
    std::unique_ptr<std::atomic<int64_t>[]> next_unit;
    std::vector<AttentionScratch> scratch;
    std::atomic<int64_t> next_draw;

    explicit State(const Model& model) : m(model) {
        entry = m.rank + m.rope;
        head_size = m.nope + m.rope;
        query_size = m.heads * head_size;
        kv_size = m.kv_heads * head_size;
        layer_floats = PAGE * (m.latent ? entry : 2 * kv_size);
        gate_floats = m.memory.taps > 1 ? m.memory.layers * PAGE * m.streams : 0;
        page_floats = layer_floats * (m.layers + m.modules) + gate_floats;
        bound_floats = m.latent ? 2 * entry : 2 * kv_size;  // of a page and layer
        next_unit.reset(new std::atomic<int64_t>[m.layers + m.modules]);
    }

    float* cache(int64_t sequence, int64_t page, int64_t layer, const Batch& b) const {
        return pool + b.pages[sequence * b.page_slots + page] * page_floats + layer * layer_floats;
    }

    void prepare(const Batch& b, int64_t threads) {
        const int64_t n = b.rows, half = m.rope / 2;
        auto fit = [](auto& v, int64_t size) {
            if (v.size() < (size_t)size) v.resize(size);
        };
        fit(residual, n * m.hidden), fit(query, n * query_size), fit(kv, n * (m.latent ? entry : 2 * kv_size));
        if (m.latent) fit(absorbed, n * m.heads * entry), fit(latent_mixed, n * m.heads * m.rank);
        fit(cosines, n * half), fit(sines, n * half), fit(row_sequence, n), fit(row_position, n);
        normed.fit(n, m.hidden), mixed.fit(n, m.heads * m.v_width);
        if (m.q_rank) low.fit(n, m.q_rank);
        int64_t widest = 0;
        for (int64_t l = 0; l < m.layers + m.modules; ++l) widest = std::max(widest, m.layer[l].gate.rows);
        fit(both, n * 2 * widest);
        if (m.experts) {
            const int64_t slots = n * m.top_k + m.experts * TILE;  // an expert's rows begin with a tile
            gathered.fit(slots, m.hidden), expert_inner.fit(slots, m.expert_width);
            fit(expert_both, slots * 2 * m.expert_width), fit(expert_out, slots * m.hidden);
            fit(chosen, slots), fit(slot, slots), fit(gates, slots), fit(expert_start, m.experts),
                fit(expert_count, m.experts);
        }
        if ((int64_t)scratch.size() < threads) scratch.resize(threads);
        for (int64_t l = 0; l < m.layers + m.modules; ++l) next_unit[l] = 0;
        next_draw = 0;
        units.clear(), filled.clear();
        const int64_t shared = m.latent ? m.heads : m.heads / m.kv_heads;  // heads that share their keys
        for (int64_t s = 0; s < b.sequences; ++s) {
            // with selection every row, and every head with keys of its own or a latent to itself, chooses its pages
            const int64_t count = b.starts[s + 1] - b.starts[s],
                          tile = bounds ? 1 : std::max<int64_t>(1, TILE_QUERIES / shared);
            // a single row is shared out by heads where there would be too few units otherwise
            const int64_t cut = !m.latent              ? shared
                                : bounds               ? 1
                                : b.rows < 2 * threads ? std::max<int64_t>(1, shared / threads)
                                                       : shared;
            for (int64_t p = b.positions[s] / PAGE; bounds && (p + 1) * PAGE <= b.positions[s] + count; ++p)
                filled.push_back({s, p});
            for (int64_t r = 0; r < count; ++r)
                row_sequence[b.starts[s] + r] = s, row_position[b.starts[s] + r] = b.positions[s] + r;
            for (int64_t r = 0; r < count; r += tile)
                for (int64_t h = 0; h < m.heads; h += cut)
                    units.push_back({s, b.starts[s] + r, std::min(tile, count - r), h, std::min(cut, m.heads - h)});
        }
        // the longest pasts first, so that the threads end together
        std::stable_sort(units.begin(), units.end(), [&](const Unit& x, const Unit& y) { return work(x) > work(y); });
    }

    int64_t work(const Unit& u) const { return (row_position[u.row] + u.rows) * u.rows * u.heads; }

    void embed(float* out, int64_t token) const {
        const Matrix& w = m.embedding;
        if (w.kind == FLOAT32) std::memcpy(out, (const float*)w.weights + token * w.columns, w.columns * sizeof(float));
        else if (w.kind == BFLOAT16)
            for (int64_t k = 0; k < w.columns; ++k) {
                uint32_t word = (uint32_t)((const uint16_t*)w.weights)[token * w.columns + k] << 16;
                std::memcpy(out + k, &word, 4);
            }
        else {
            const int64_t panel = token / PANEL, r = token % PANEL, width = w.kind == PACKED8 ? 8 : 4;
            for (int64_t k = 0; k < w.columns; ++k) {
                const uint8_t* block =
                    (const uint8_t*)w.weights + (panel * (w.columns / BLOCK) + k / BLOCK) * PANEL * BLOCK * width / 8;
                const int64_t c = k % BLOCK;
                int q = width == 8 ? block[c / 4 * 64 + r * 4 + c % 4]
                                   : block[c % 16 / 4 * 64 + r * 4 + c % 4] >> (c < 16 ? 0 : 4) & 15;
                const uint16_t* scales = (const uint16_t*)w.scales +
                                         (panel * (w.columns / w.group) + k / w.group) * PANEL * (w.has_low ? 2 : 1);
                out[k] = w.has_low ? halves(scales)[r] * q + halves(scales + PANEL)[r]
                                   : halves(scales)[r] * (q - (1 << (width - 1)));
            }
        }
    }

    void start(const Team& t, const Batch& b) {
        int64_t begin, end, half = m.rope / 2;
        t.share(b.rows, begin, end);
        for (int64_t r = begin; r < end; ++r)
            for (int64_t i = 0; i < half; ++i) {
                float angle = (float)row_position[r] * m.frequencies[i];
                cosines[r * half + i] = std::cos(angle) * (float)m.rope_scale;
                sines[r * half + i] = std::sin(angle) * (float)m.rope_scale;
            }
    }

    // out = (or +=) in . w, this thread's share of the outputs
    void multiply(const Team& t, const Matrix& w, const Rows& in, int64_t rows, float* out, int64_t stride,
                  bool add = false) const {
        int64_t begin, end;
        t.share(w.rows, begin, end, PANEL);
        if (begin < end) product(w, in, rows, out, stride, add, begin, end);
    }

    void norm_row(Buffer& to, int64_t r, const float* x, const float* weight, int64_t width, double eps, bool rounded) {
        rms_norm(to.row(r), x, weight, width, eps);
        if (rounded) round_row(to.rows, r);
    }
};
