// One forward pass of many sequences at once through the whole model, on pages, in one native call: every thread runs this
// function, takes its share of the work, and meets the others at barriers. native.py fills the structures; runner.py's
// PlainRunner is the twin.

#include <memory>
#include "attention.h"
#include "sample.h"
#include "team.h"

struct Layer {
    const float *input_norm, *post_norm, *q_a_norm, *kv_a_norm, *q_norm, *k_norm, *kv_b, *router_bias;
    Matrix q_a, q_b, q, kv_a, k, v, o, router, gate, up, down, expert_gate_up, expert_down;
};

struct Module {  // multi-token prediction
    const float *enorm, *hnorm, *norm;
    Matrix eh_proj;
};

struct Model {
    int64_t layers, modules, hidden, vocabulary;
    int64_t latent, heads, kv_heads, nope, rope, v_width, rank, q_rank, interleave;  // GQA: nope 0, rope = v_width = head
    int64_t experts, top_k, expert_width, groups, top_groups, group_best, softmax, normalise;
    double norm_eps, latent_eps, scale, rope_scale, routed_scale;
    Matrix embedding, head;
    const float *final_norm, *frequencies;
    const Layer* layer;  // the main model's, then one for each module
    const Module* module;
};

// Rows of one forward pass: those of each sequence follow one another, and so do their positions.
struct Batch {
    int64_t rows, sequences, page_slots;
    const int64_t *tokens, *starts, *positions;  // [rows], [sequences + 1], [sequences]
    const int32_t* pages;                        // [sequences, page_slots]
};

// What to do after the rows `row`: draw a token, or give the log-probability of `target`.
struct Draws {
    int64_t count, want_logprobs;
    const int64_t *row, *target;  // [count]; target may be null
    const float *temperature, *top_p;
    const uint32_t* keys;  // [count, 4]
    int64_t* tokens;       // out
    float *logprobs, *logits;  // out; logits [count, vocabulary] or null
};

static int64_t whole(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

static void rms_norm(float* out, const float* x, const float* weight, int64_t n, double eps) {
    float scale = 1.0f / std::sqrt(dot(x, x, n) / n + (float)eps);
    for (int64_t i = 0; i < n; i += LANES) {
        int64_t left = std::min(LANES, n - i);
        store_some(out + i, load_some(x + i, left) * scale * load_some(weight + i, left), left);
    }
}

// Rotate x [2 * half]: adjacent pairs come out split into halves, as in rope.py.
static void rotate(float* x, const float* cos, const float* sin, int64_t half, bool interleave) {
    float turned[512];
    for (int64_t i = 0; i < half; ++i) {
        float a = interleave ? x[2 * i] : x[i], b = interleave ? x[2 * i + 1] : x[half + i];
        turned[i] = a * cos[i] - b * sin[i];
        turned[half + i] = b * cos[i] + a * sin[i];
    }
    std::memcpy(x, turned, 2 * half * sizeof(float));
}

static void gated(float* out, const float* gate, const float* up, int64_t n) {  // silu(gate) * up
    for (int64_t i = 0; i < n; i += LANES) {
        int64_t left = std::min(LANES, n - i);
        Vec g = load_some(gate + i, left), u = load_some(up + i, left);
        store_some(out + i, g / (exponential(-g) + 1.0f) * u, left);
    }
}

// Memory for rows of activations that only grows.
struct Buffer {
    Array<float> x, numbers[4];
    Array<int8_t> bytes[2];
    Array<uint64_t> uneven;
    Rows rows{};
    void fit(int64_t count, int64_t width) {
        const int64_t blocks = whole(width, BLOCK) / BLOCK, words = whole(blocks, 64) / 64, tiled = whole(count, TILE);
        auto grow = [](auto& v, int64_t size) { if (v.size() < (size_t)size) v.resize(size); };
        grow(x, count * width + LANES), grow(uneven, count * words);
        for (auto& v : numbers) grow(v, tiled * blocks);
        for (auto& v : bytes) grow(v, tiled * blocks * BLOCK);
        rows = {x.data(), width, {bytes[0].data(), numbers[0].data(), numbers[1].data()},
                {bytes[1].data(), numbers[2].data(), numbers[3].data()}, uneven.data()};
    }
    float* row(int64_t r) { return rows.x + r * rows.width; }
    Rows from(int64_t r) const {  // r: the first of a tile
        Rows part = rows;
        part.x += r * rows.width;
        for (Rounded* one : {&part.first, &part.rest}) one->q += r * rows.width, one->scale += r * rows.blocks(), one->total += r * rows.blocks();
        part.uneven += r * rows.words();
        return part;
    }
    void copy_rounded(int64_t i, const Rows& from, int64_t r) {
        const bool uneven[2] = {true, std::any_of(from.uneven + r * from.words(), from.uneven + (r + 1) * from.words(), [](uint64_t w) { return w; })};
        const Rounded *to[2] = {&rows.first, &rows.rest}, *other[2] = {&from.first, &from.rest};
        for (int part = 0; part < 2; ++part)
            for (int64_t b = 0; uneven[part] && b < rows.blocks(); ++b) {
                const int64_t here = rows.place(i, b), there = from.place(r, b);
                for (int c = 0; c < 8; ++c)
                    std::memcpy(to[part]->q + Rows::bytes(here) + c * 4 * TILE, other[part]->q + Rows::bytes(there) + c * 4 * TILE, 4);
                to[part]->scale[here] = other[part]->scale[there], to[part]->total[here] = other[part]->total[there];
            }
        std::memcpy(rows.uneven + i * rows.words(), from.uneven + r * rows.words(), rows.words() * 8);
    }
};

static float take_best(std::vector<float>& x, int64_t begin, int64_t end, int64_t& best) {
    best = begin;
    for (int64_t i = begin + 1; i < end; ++i) if (x[i] > x[best]) best = i;
    float value = x[best];
    x[best] = -INFINITY;
    return value;
}

struct Engine {
    Model m;
    float *pool = nullptr, *bounds = nullptr;  // bounds: what `select` looks at, null without selection
    double share = 1;                          // of a long past's pages that are read
    int64_t page_floats, layer_floats, bound_floats, entry, head_size, query_size, kv_size;
    std::atomic<int64_t> pages_read{0}, pages_past{0};

    Buffer normed, low, mixed, inner, gathered, expert_inner, last, joined;
    Array<float> residual, query, kv, absorbed, latent_mixed, both, expert_both, expert_out, cosines, sines, hidden, logits, gates;
    std::vector<int64_t> row_sequence, row_position, chosen, slot, expert_start, expert_count;
    std::vector<Unit> units;
    std::vector<std::pair<int64_t, int64_t>> filled;  // (sequence, page) that this pass completes
    std::unique_ptr<std::atomic<int64_t>[]> next_unit;
    std::vector<AttentionScratch> scratch;
    std::atomic<int64_t> next_draw;

    explicit Engine(const Model& model) : m(model) {
        entry = m.rank + m.rope;
        head_size = m.nope + m.rope;
        query_size = m.heads * head_size;
        kv_size = m.kv_heads * head_size;
        layer_floats = PAGE * (m.latent ? entry : 2 * kv_size);
        page_floats = layer_floats * (m.layers + m.modules);
        bound_floats = m.latent ? 2 * entry : 2 * kv_size;  // of a page and layer
        next_unit.reset(new std::atomic<int64_t>[m.layers + m.modules]);
    }

    float* cache(int64_t sequence, int64_t page, int64_t layer, const Batch& b) const {
        return pool + b.pages[sequence * b.page_slots + page] * page_floats + layer * layer_floats;
    }

    // --- before the layers ---------------------------------------------------------------------------------------------

    void prepare(const Batch& b, int64_t threads) {
        const int64_t n = b.rows, half = m.rope / 2;
        auto fit = [](auto& v, int64_t size) { if (v.size() < (size_t)size) v.resize(size); };
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
            fit(chosen, slots), fit(slot, slots), fit(gates, slots), fit(expert_start, m.experts), fit(expert_count, m.experts);
        }
        if ((int64_t)scratch.size() < threads) scratch.resize(threads);
        for (int64_t l = 0; l < m.layers + m.modules; ++l) next_unit[l] = 0;
        next_draw = 0;
        units.clear(), filled.clear();
        const int64_t shared = m.latent ? m.heads : m.heads / m.kv_heads;  // heads that share their keys
        for (int64_t s = 0; s < b.sequences; ++s) {
            // with selection every row, and every head with keys of its own or a latent to itself, chooses its pages
            const int64_t count = b.starts[s + 1] - b.starts[s], tile = bounds ? 1 : std::max<int64_t>(1, TILE_QUERIES / shared);
            // a single row is shared out by heads where there would be too few units otherwise
            const int64_t cut = !m.latent ? shared : bounds ? 1 : b.rows < 2 * threads ? std::max<int64_t>(1, shared / threads) : shared;
            for (int64_t p = b.positions[s] / PAGE; bounds && (p + 1) * PAGE <= b.positions[s] + count; ++p) filled.push_back({s, p});
            for (int64_t r = 0; r < count; ++r) row_sequence[b.starts[s] + r] = s, row_position[b.starts[s] + r] = b.positions[s] + r;
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
        else if (w.kind == BFLOAT16) for (int64_t k = 0; k < w.columns; ++k) {
            uint32_t word = (uint32_t)((const uint16_t*)w.weights)[token * w.columns + k] << 16;
            std::memcpy(out + k, &word, 4);
        } else {
            const int64_t panel = token / PANEL, r = token % PANEL, width = w.kind == PACKED8 ? 8 : 4;
            for (int64_t k = 0; k < w.columns; ++k) {
                const uint8_t* block = (const uint8_t*)w.weights + (panel * (w.columns / BLOCK) + k / BLOCK) * PANEL * BLOCK * width / 8;
                const int64_t c = k % BLOCK;
                int q = width == 8 ? block[c / 4 * 64 + r * 4 + c % 4] : block[c % 16 / 4 * 64 + r * 4 + c % 4] >> (c < 16 ? 0 : 4) & 15;
                const uint16_t* scales = (const uint16_t*)w.scales + (panel * (w.columns / w.group) + k / w.group) * PANEL * (w.has_low ? 2 : 1);
                out[k] = w.has_low ? halves(scales)[r] * q + halves(scales + PANEL)[r] : halves(scales)[r] * (q - (1 << (width - 1)));
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

    // --- one layer: the residual of every row, in place ------------------------------------------------------------------

    // out = (or +=) in . w, this thread's share of the outputs
    void multiply(const Team& t, const Matrix& w, const Rows& in, int64_t rows, float* out, int64_t stride, bool add = false) const {
        int64_t begin, end;
        t.share(w.rows, begin, end, PANEL);
        if (begin < end) product(w, in, rows, out, stride, add, begin, end);
    }

    void norm_row(Buffer& to, int64_t r, const float* x, const float* weight, int64_t width, double eps, bool rounded) {
        rms_norm(to.row(r), x, weight, width, eps);
        if (rounded) round_row(to.rows, r);
    }

    void run_layer(const Team& t, const Batch& b, int64_t index) {
        const Layer& w = m.layer[index];
        int64_t begin, end;
        t.share(b.rows, begin, end);
        const bool rounded = w.kv_a.packed() || w.q_a.packed() || w.q.packed() || w.k.packed() || w.v.packed();
        for (int64_t r = begin; r < end; ++r)
            norm_row(normed, r, residual.data() + r * m.hidden, w.input_norm, m.hidden, m.norm_eps, rounded);
        t.wait();
        if (m.latent) latent_attention(t, b, index, w, begin, end);
        else grouped_attention(t, b, index, w, begin, end);
        t.wait();
        if (w.o.packed()) {
            for (int64_t r = begin; r < end; ++r) round_row(mixed.rows, r);
            t.wait();
        }
        multiply(t, w.o, mixed.rows, b.rows, residual.data(), m.hidden, true);
        t.wait();
        for (int64_t r = begin; r < end; ++r)
            norm_row(normed, r, residual.data() + r * m.hidden, w.post_norm, m.hidden, m.norm_eps, w.gate.packed() || w.up.packed() || w.expert_gate_up.packed());
        if (w.router.kind) route(w, begin, end);
        t.wait();
        feed_forward(t, b, w, begin, end);
        t.wait();
    }

    // --- selection: of a long past only the pages that may matter are read (as Quest, arXiv 2406.10774) ------------------

    // The smallest and largest value of every element over a full page's keys; head: of GQA, 0 for latent entries.
    void bound_page(int64_t page, int64_t layer, int64_t head) {
        const float* keys = pool + page * page_floats + layer * layer_floats;
        const int64_t width = m.latent ? entry : head_size;
        float *low = bounds + (page * m.layers + layer) * bound_floats + head * 2 * width, *high = low + width;
        for (int64_t i = 0; i < width; ++i) {
            const float* from = m.latent ? keys + i : keys + (head * head_size + i) * PAGE;
            const int64_t stride = m.latent ? entry : 1;
            low[i] = high[i] = from[0];
            for (int64_t k = 1; k < PAGE; ++k) low[i] = std::min(low[i], from[k * stride]), high[i] = std::max(high[i], from[k * stride]);
        }
    }

    void bound_filled(const Team& t, const Batch& b, int64_t layer) {
        if (!bounds || layer >= m.layers) return;
        const int64_t heads = m.latent ? 1 : m.kv_heads;
        int64_t begin, end;
        t.share(filled.size() * heads, begin, end);
        for (int64_t i = begin; i < end; ++i) {
            auto [sequence, page] = filled[i / heads];
            bound_page(b.pages[sequence * b.page_slots + page], layer, i % heads);
        }
        t.wait();
    }

    // Which pages a row's queries read, ascending: the first, the last RECENT, and of the others those whose keys could
    // give the highest score.
    void select(AttentionScratch& s, const Batch& b, const Unit& u, int64_t layer, int64_t queries, int64_t group) const {
        const int64_t past = row_position[u.row] / PAGE + 1, width = m.latent ? entry : head_size;
        s.pages.resize(past);
        std::iota(s.pages.begin(), s.pages.end(), 0);
        const int64_t wanted = std::max<int64_t>(RECENT + 2, std::ceil(share * past)), others = past - 1 - RECENT;
        if (layer >= m.layers || wanted >= past) return;
        s.bound.resize(past);
        for (int64_t p = 1; p <= others; ++p) {
            const float *low = bounds + (b.pages[u.sequence * b.page_slots + p] * m.layers + layer) * bound_floats + group * 2 * width, *high = low + width;
            s.bound[p] = -INFINITY;
            for (int64_t q = 0; q < queries; ++q) {
                Vec total{};
                for (int64_t i = 0; i < width; i += LANES) {
                    const int64_t left = std::min(LANES, width - i);
                    Vec x = load_some(s.query.data() + q * width + i, left);
                    total += larger(x * load_some(low + i, left), x * load_some(high + i, left));
                }
                s.bound[p] = std::max(s.bound[p], sum(total));
            }
        }
        auto first = s.pages.begin() + 1, last = first + others, cut = first + (wanted - 1 - RECENT);
        std::nth_element(first, cut, last, [&](int64_t x, int64_t y) { return s.bound[x] != s.bound[y] ? s.bound[x] > s.bound[y] : x < y; });
        std::sort(first, cut);
        s.pages.erase(cut, last);
    }

    void latent_attention(const Team& t, const Batch& b, int64_t index, const Layer& w, int64_t begin, int64_t end) {
        const int64_t half = m.rope / 2, both_sizes = m.nope + m.v_width;
        multiply(t, w.kv_a, normed.rows, b.rows, kv.data(), entry);
        if (m.q_rank) {
            multiply(t, w.q_a, normed.rows, b.rows, low.rows.x, m.q_rank);
            t.wait();
            for (int64_t r = begin; r < end; ++r) norm_row(low, r, low.row(r), w.q_a_norm, m.q_rank, m.latent_eps, w.q_b.packed());
            t.wait();
            multiply(t, w.q_b, low.rows, b.rows, query.data(), query_size);
        } else {
            multiply(t, w.q, normed.rows, b.rows, query.data(), query_size);
        }
        t.wait();
        for (int64_t r = begin; r < end; ++r) {
            const int64_t position = row_position[r];
            float *mine = cache(row_sequence[r], position / PAGE, index, b) + position % PAGE * entry, *from = kv.data() + r * entry;
            const float *cos = cosines.data() + r * half, *sin = sines.data() + r * half;
            rotate(from + m.rank, cos, sin, half, m.interleave);
            rms_norm(mine, from, w.kv_a_norm, m.rank, m.latent_eps);
            std::memcpy(mine + m.rank, from + m.rank, m.rope * sizeof(float));
            for (int64_t h = 0; h < m.heads; ++h) {
                float *q = query.data() + r * query_size + h * head_size, *to = absorbed.data() + (r * m.heads + h) * entry;
                rotate(q + m.nope, cos, sin, half, m.interleave);
                for (int64_t i = 0; i < m.nope; ++i) q[i] *= (float)m.scale;
                for (int64_t i = 0; i < m.rope; ++i) to[m.rank + i] = q[m.nope + i] * (float)m.scale;
            }
        }
        t.wait();
        bound_filled(t, b, index);
        // W_UK moves into the query: heads attend over the latents themselves
        for_heads(t, b, [&](int64_t h, int64_t r, int64_t rows) {
            outer_product(query.data() + r * query_size + h * head_size, query_size, w.kv_b + h * both_sizes * m.rank, m.rank, rows, m.nope,
                          m.rank, absorbed.data() + (r * m.heads + h) * entry, m.heads * entry, nullptr);
        });
        t.wait();
        for_units(t, index, [&](const Unit& u, AttentionScratch& s) {
            const int64_t queries = u.rows * u.heads;
            s.fit(queries, entry);
            for (int64_t i = 0; i < u.rows; ++i)
                std::memcpy(s.query.data() + i * u.heads * entry, absorbed.data() + ((u.row + i) * m.heads + u.head) * entry, u.heads * entry * sizeof(float));
            attend(s, b, u, index, queries, m.rank, 0, [&](const float* page, int64_t deepest) {
                all_dots(s.query.data(), entry, queries, page, entry, entry, 0, deepest, {s.score.data(), PAGE});
                return std::pair<const float*, int64_t>{page, entry};
            });
            for (int64_t i = 0; i < u.rows; ++i)
                for (int64_t h = 0; h < u.heads; ++h) {
                    const int64_t q = i * u.heads + h;
                    float *to = latent_mixed.data() + ((u.row + i) * m.heads + u.head + h) * m.rank, *from = s.mixed.data() + q * m.rank;
                    for (int64_t k = 0; k < m.rank; ++k) to[k] = from[k] / s.total[q];
                }
        });
        t.wait();
        for_heads(t, b, [&](int64_t h, int64_t r, int64_t rows) {  // W_UV behind the softmax
            all_dots(latent_mixed.data() + (r * m.heads + h) * m.rank, m.heads * m.rank, rows, w.kv_b + (h * both_sizes + m.nope) * m.rank, m.rank,
                     m.rank, 0, m.v_width, {mixed.row(r) + h * m.v_width, mixed.rows.width});
        });
    }

    // heads x stretches of rows, shared out
    template <class Body>
    void for_heads(const Team& t, const Batch& b, Body body) const {
        const int64_t stretch = 48, stretches = (b.rows + stretch - 1) / stretch;
        int64_t begin, end;
        t.share(m.heads * stretches, begin, end);
        for (int64_t i = begin; i < end; ++i) {
            const int64_t r = i % stretches * stretch;
            body(i / stretches, r, std::min(stretch, b.rows - r));
        }
    }

    template <class Body>
    void for_units(const Team& t, int64_t index, Body body) {
        for (int64_t i; (i = next_unit[index].fetch_add(1, std::memory_order_relaxed)) < (int64_t)units.size();) body(units[i], scratch[t.index]);
    }

    // All pages of a unit; keys(page, deepest) fills the scores and gives the values and their stride.
    template <class Keys>
    void attend(AttentionScratch& s, const Batch& b, const Unit& u, int64_t index, int64_t queries, int64_t width, int64_t group, Keys keys) {
        std::fill(s.top.begin(), s.top.begin() + queries, -INFINITY);
        std::fill(s.total.begin(), s.total.begin() + queries, 0.0f);
        std::fill(s.mixed.begin(), s.mixed.begin() + queries * width, 0.0f);
        const int64_t first = row_position[u.row], past = (first + u.rows + PAGE - 1) / PAGE;
        if (bounds) {
            select(s, b, u, index, queries, group);
            pages_read += s.pages.size(), pages_past += past;
        }
        for (int64_t i = 0; i < (bounds ? (int64_t)s.pages.size() : past); ++i) {
            const int64_t page = bounds ? s.pages[i] : i;
            const int64_t deepest = std::min(PAGE, first + u.rows - page * PAGE);
            auto [values, stride] = keys(cache(u.sequence, page, index, b), deepest);
            absorb_page(s, queries, values, stride, width, deepest, [&](int64_t q) { return first + q / u.heads + 1 - page * PAGE; });
        }
    }

    void grouped_attention(const Team& t, const Batch& b, int64_t index, const Layer& w, int64_t begin, int64_t end) {
        const int64_t half = m.rope / 2;
        float* values = kv.data() + b.rows * kv_size;
        multiply(t, w.q, normed.rows, b.rows, query.data(), query_size);
        multiply(t, w.k, normed.rows, b.rows, kv.data(), kv_size);
        multiply(t, w.v, normed.rows, b.rows, values, kv_size);
        t.wait();
        for (int64_t r = begin; r < end; ++r) {
            const int64_t position = row_position[r], at = position % PAGE;
            float* page = cache(row_sequence[r], position / PAGE, index, b);
            const float *cos = cosines.data() + r * half, *sin = sines.data() + r * half;
            for (int64_t h = 0; h < m.kv_heads; ++h) {
                float *k = kv.data() + r * kv_size + h * head_size, *to = page + h * head_size * PAGE + at;
                if (w.k_norm) rms_norm(k, k, w.k_norm, head_size, m.norm_eps);
                rotate(k, cos, sin, half, false);
                for (int64_t i = 0; i < head_size; ++i) to[i * PAGE] = k[i];  // keys lie transposed in a page
                std::memcpy(page + (m.kv_heads + h) * head_size * PAGE + at * head_size, values + r * kv_size + h * head_size, head_size * sizeof(float));
            }
            for (int64_t h = 0; h < m.heads; ++h) {
                float* q = query.data() + r * query_size + h * head_size;
                if (w.q_norm) rms_norm(q, q, w.q_norm, head_size, m.norm_eps);
                rotate(q, cos, sin, half, false);
                for (int64_t i = 0; i < head_size; ++i) q[i] *= (float)m.scale;
            }
        }
        t.wait();
        bound_filled(t, b, index);
        for_units(t, index, [&](const Unit& u, AttentionScratch& s) {
            const int64_t queries = u.rows * u.heads, size = u.heads * head_size, group = u.head / u.heads;
            s.fit(queries, head_size);
            for (int64_t i = 0; i < u.rows; ++i)
                std::memcpy(s.query.data() + i * size, query.data() + (u.row + i) * query_size + u.head * head_size, size * sizeof(float));
            attend(s, b, u, index, queries, head_size, group, [&](const float* page, int64_t deepest) {
                outer_product(s.query.data(), head_size, page + group * head_size * PAGE, PAGE, queries, head_size, whole(deepest, LANES), s.score.data(), PAGE, nullptr);
                return std::pair<const float*, int64_t>{page + (m.kv_heads + group) * head_size * PAGE, head_size};
            });
            for (int64_t q = 0; q < queries; ++q) {
                float *to = mixed.row(u.row + q / u.heads) + (u.head + q % u.heads) * head_size, *from = s.mixed.data() + q * head_size;
                for (int64_t k = 0; k < head_size; ++k) to[k] = from[k] / s.total[q];
            }
        });
    }

    // The chosen experts of rows [begin, end) and their gates, as Router in moe.py.
    void route(const Layer& w, int64_t begin, int64_t end) {
        std::vector<float> score(m.experts * std::max<int64_t>(0, end - begin)), rank(m.experts), group(m.groups);
        all_dots(normed.row(begin), m.hidden, end - begin, (const float*)w.router.weights, m.hidden, m.hidden, 0, m.experts, {score.data(), m.experts});
        for (int64_t r = begin; r < end; ++r) {
            float *s = score.data() + (r - begin) * m.experts, top = s[0], total = 0;
            for (int64_t e = 0; e < m.experts; ++e) top = std::max(top, s[e]);
            for (int64_t e = 0; e < m.experts; ++e) {
                s[e] = m.softmax ? std::exp(s[e] - top) : 1.0f / (1.0f + std::exp(-s[e]));
                total += s[e];
            }
            for (int64_t e = 0; e < m.experts; ++e) {
                if (m.softmax) s[e] /= total;
                rank[e] = s[e] + (w.router_bias ? w.router_bias[e] : 0.0f);
            }
            int64_t best;
            if (m.top_groups < m.groups) {
                const int64_t size = m.experts / m.groups;
                std::vector<float> copy = rank;
                for (int64_t g = 0; g < m.groups; ++g) {
                    group[g] = 0;
                    for (int64_t i = 0; i < m.group_best && i < size; ++i) group[g] += take_best(copy, g * size, (g + 1) * size, best);
                }
                std::vector<bool> kept(m.groups, false);
                for (int64_t i = 0; i < m.top_groups; ++i) take_best(group, 0, m.groups, best), kept[best] = true;
                for (int64_t e = 0; e < m.experts; ++e) if (!kept[e / size]) rank[e] = -INFINITY;
            }
            float chosen_total = 0;
            for (int64_t k = 0; k < m.top_k; ++k) {
                take_best(rank, 0, m.experts, best);
                chosen[r * m.top_k + k] = best;
                chosen_total += gates[r * m.top_k + k] = s[best];
            }
            for (int64_t k = 0; k < m.top_k; ++k)
                gates[r * m.top_k + k] = gates[r * m.top_k + k] / (m.normalise ? chosen_total + 1e-20f : 1.0f) * (float)m.routed_scale;
        }
    }

    // Rows by expert: slot[r * top_k + k] is where row r's k-th expert finds it.
    void group_by_expert(const Batch& b) {
        std::fill(expert_count.begin(), expert_count.end(), 0);
        for (int64_t i = 0; i < b.rows * m.top_k; ++i) ++expert_count[chosen[i]];
        for (int64_t e = 0, end = 0; e < m.experts; ++e) {
            expert_start[e] = end;
            end = whole(end + expert_count[e], TILE);
        }
        std::vector<int64_t> next = expert_start;
        for (int64_t i = 0; i < b.rows * m.top_k; ++i) slot[i] = next[chosen[i]]++;
    }

    void feed_forward(const Team& t, const Batch& b, const Layer& w, int64_t begin, int64_t end) {
        const int64_t wide = w.gate.rows, inside = m.expert_width;  // wide: a dense layer's, or the shared experts'
        if (w.router.kind) {
            if (t.index == 0) group_by_expert(b);
            t.wait();
            for (int64_t r = begin; r < end; ++r)
                for (int64_t k = 0; k < m.top_k; ++k) copy_row(gathered, slot[r * m.top_k + k], normed, r, w.expert_gate_up.packed());
            t.wait();
            for_experts([&](int64_t e, int64_t from, int64_t count) {
                multiply(t, w.expert_gate_up.at(e), gathered.from(from), count, expert_both.data() + from * 2 * inside, 2 * inside);
            });
        }
        if (wide) {
            multiply(t, w.gate, normed.rows, b.rows, both.data(), 2 * wide);
            multiply(t, w.up, normed.rows, b.rows, both.data() + wide, 2 * wide);
            if (t.index == 0) inner.fit(b.rows, wide);
        }
        t.wait();
        if (wide)
            for (int64_t r = begin; r < end; ++r) {
                gated(inner.row(r), both.data() + r * 2 * wide, both.data() + r * 2 * wide + wide, wide);
                if (w.down.packed()) round_row(inner.rows, r);
            }
        if (w.router.kind) {
            int64_t from, to;
            t.share(b.rows * m.top_k, from, to);
            for (int64_t k = from; k < to; ++k) {
                const int64_t i = slot[k];
                gated(expert_inner.row(i), expert_both.data() + i * 2 * inside, expert_both.data() + i * 2 * inside + inside, inside);
                if (w.expert_down.packed()) round_row(expert_inner.rows, i);
            }
        }
        t.wait();
        if (wide) multiply(t, w.down, inner.rows, b.rows, residual.data(), m.hidden, true);
        if (!w.router.kind) return;
        for_experts([&](int64_t e, int64_t from, int64_t count) {
            multiply(t, w.expert_down.at(e), expert_inner.from(from), count, expert_out.data() + from * m.hidden, m.hidden);
        });
        t.wait();
        for (int64_t r = begin; r < end; ++r)
            for (int64_t k = 0; k < m.top_k; ++k) {
                const float *from = expert_out.data() + slot[r * m.top_k + k] * m.hidden, gate = gates[r * m.top_k + k];
                for (int64_t i = 0; i < m.hidden; ++i) residual[r * m.hidden + i] += gate * from[i];
            }
    }

    template <class Body>
    void for_experts(Body body) const {
        for (int64_t e = 0; e < m.experts; ++e)
            if (expert_count[e]) body(e, expert_start[e], expert_count[e]);
    }

    static void copy_row(Buffer& to, int64_t i, const Buffer& from, int64_t r, bool rounded) {
        if (rounded) to.copy_rounded(i, from.rows, r);
        else std::memcpy(to.row(i), from.rows.x + r * from.rows.width, from.rows.width * sizeof(float));
    }

    // --- after the layers ------------------------------------------------------------------------------------------------

    // Head and draw for the states `state(i)` [hidden], after the last norm, of the i-th draw.
    template <class State, class Position>
    void finish(const Team& t, const Draws& d, State state, Position position) {
        const int64_t stretch = 64, vocabulary = m.head.rows;
        for (int64_t first = 0; first < d.count; first += stretch) {
            const int64_t count = std::min(stretch, d.count - first);
            int64_t begin, end;
            t.share(count, begin, end);
            for (int64_t i = begin; i < end; ++i) {
                std::memcpy(last.row(i), state(first + i), m.hidden * sizeof(float));
                if (m.head.packed()) round_row(last.rows, i);
            }
            if (t.index == 0) next_draw = 0;
            t.wait();
            multiply(t, m.head, last.rows, count, logits.data(), vocabulary);
            t.wait();
            for (int64_t i; (i = next_draw.fetch_add(1, std::memory_order_relaxed)) < count;) {
                const float* mine = logits.data() + i * vocabulary;
                const int64_t k = first + i, top = most_likely(mine, m.vocabulary);
                if (d.logits) std::memcpy(d.logits + k * m.vocabulary, mine, m.vocabulary * sizeof(float));
                d.tokens[k] = d.target && std::isfinite(mine[top]) ? d.target[k]
                            : draw(mine, m.vocabulary, d.temperature[k], d.top_p[k], (uint32_t)position(k), d.keys + 4 * k);
                d.logprobs[k] = d.want_logprobs && d.tokens[k] >= 0 ? log_probability(mine, m.vocabulary, d.tokens[k], mine[top]) : 0.0f;
            }
            t.wait();
        }
    }

    void fit_draws(int64_t count) {
        count = std::min<int64_t>(count, 64);
        last.fit(std::max<int64_t>(count, 1), m.hidden);
        if (logits.size() < (size_t)(count * m.head.rows)) logits.resize(count * m.head.rows);
    }

    void step(const Batch& b, const Draws& d, int64_t threads) {
        prepare(b, threads);
        fit_draws(d.count);
        if (hidden.size() < residual.size()) hidden.resize(residual.size());
        together(threads, [&](const Team& t) {
            int64_t begin, end;
            t.share(b.rows, begin, end);
            start(t, b);
            for (int64_t r = begin; r < end; ++r) embed(residual.data() + r * m.hidden, b.tokens[r]);
            for (int64_t l = 0; l < m.layers; ++l) run_layer(t, b, l);
            if (m.modules)  // a draft may need the state of any row
                for (int64_t r = begin; r < end; ++r) norm_state(r);
            else
                for (int64_t i = t.index; i < d.count; i += t.threads) norm_state(d.row[i]);
            t.wait();
            finish(t, d, [&](int64_t i) { return hidden.data() + d.row[i] * m.hidden; }, [&](int64_t i) { return row_position[d.row[i]] + 1; });
        });
    }

    void norm_state(int64_t r) { rms_norm(hidden.data() + r * m.hidden, residual.data() + r * m.hidden, m.final_norm, m.hidden, m.norm_eps); }

    // The first MTP module over rows whose states the last step left: `from` [rows] are their places in that step.
    void draft(const Batch& b, const int64_t* from, const Draws& d, int64_t threads) {
        const Module& w = m.module[0];
        prepare(b, threads);
        fit_draws(d.count);
        joined.fit(b.rows, 2 * m.hidden);
        together(threads, [&](const Team& t) {
            int64_t begin, end;
            t.share(b.rows, begin, end);
            start(t, b);
            std::vector<float> embedded(m.hidden);
            for (int64_t r = begin; r < end; ++r) {
                embed(embedded.data(), b.tokens[r]);
                rms_norm(joined.row(r), embedded.data(), w.enorm, m.hidden, m.norm_eps);
                rms_norm(joined.row(r) + m.hidden, hidden.data() + from[r] * m.hidden, w.hnorm, m.hidden, m.norm_eps);
                if (w.eh_proj.packed()) round_row(joined.rows, r);
            }
            t.wait();
            multiply(t, w.eh_proj, joined.rows, b.rows, residual.data(), m.hidden);
            t.wait();
            run_layer(t, b, m.layers);
            std::vector<float> state(m.hidden);
            finish(t, d, [&](int64_t i) {
                rms_norm(state.data(), residual.data() + d.row[i] * m.hidden, w.norm, m.hidden, m.norm_eps);
                return state.data();
            }, [&](int64_t i) { return row_position[d.row[i]] + 2; });  // the row's own token, the one given, the one drawn
        });
    }
};

extern "C" {
Engine* engine_new(const Model* model) { return new Engine(*model); }
void engine_free(Engine* engine) { delete engine; }
int64_t engine_page_floats(const Engine* engine) { return engine->page_floats; }
void engine_pool(Engine* engine, float* pool, float* bounds, double share) { engine->pool = pool, engine->bounds = bounds, engine->share = share; }
int64_t engine_bound_floats(const Engine* engine) { return engine->bound_floats * engine->m.layers; }
void engine_bound(Engine* engine, int64_t page) {  // after a full page was filled from elsewhere
    for (int64_t l = 0; l < engine->m.layers; ++l)
        for (int64_t h = 0; h < (engine->m.latent ? 1 : engine->m.kv_heads); ++h) engine->bound_page(page, l, h);
}
void engine_pages(Engine* engine, int64_t* read, int64_t* past) { *read = engine->pages_read.exchange(0), *past = engine->pages_past.exchange(0); }
void engine_step(Engine* engine, const Batch* batch, const Draws* draws, int64_t threads) { engine->step(*batch, *draws, threads); }
void engine_draft(Engine* engine, const Batch* batch, const int64_t* from, const Draws* draws, int64_t threads) {
    engine->draft(*batch, from, *draws, threads);
}

// One product by itself, for tests and measurements: x [rows, columns] -> out [rows, w.rows].
void matrix_product(const Matrix* w, const float* x, int64_t rows, float* out, int64_t threads) {
    Buffer in;
    in.fit(rows, w->columns);
    std::memcpy(in.rows.x, x, rows * w->columns * sizeof(float));
    together(threads, [&](const Team& t) {
        int64_t begin, end;
        t.share(rows, begin, end);
        if (w->packed()) for (int64_t r = begin; r < end; ++r) round_row(in.rows, r);
        t.wait();
        t.share(w->rows, begin, end, PANEL);
        if (begin < end) product(*w, in.rows, rows, out, w->rows, false, begin, end);
    });
}
}
