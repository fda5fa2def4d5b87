// The attention of a layer, latent and grouped-query, for all rows of a pass; and selection.

#pragma once
#include "state.h"

struct AttentionLayers : State {
    using State::State;

    // --- selection: of a long past only the pages that may matter are read (as Quest, arXiv 2406.10774)
    // ------------------

    // The smallest and largest value of every element over a full page's keys; head: of GQA, 0 for latent entries.
    void bound_page(int64_t page, int64_t layer, int64_t head) {
        const float* keys = pool + page * page_floats + layer * layer_floats;
        const int64_t width = m.latent ? entry : head_size;
        float *low = bounds + (page * m.layers + layer) * bound_floats + head * 2 * width, *high = low + width;
        for (int64_t i = 0; i < width; ++i) {
            low[i] = INFINITY, high[i] = -INFINITY;
            for (int64_t k = 0; k < PAGE; ++k) {
                const float x = keys[m.latent ? k * entry + i : key_place(head, k) + i * LANES];
                low[i] = std::min(low[i], x), high[i] = std::max(high[i], x);
            }
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
    void select(AttentionScratch& s, const Batch& b, const Unit& u, int64_t layer, int64_t queries,
                int64_t group) const {
        const int64_t past = row_position[u.row] / PAGE + 1, width = m.latent ? entry : head_size;
        s.pages.resize(past);
        std::iota(s.pages.begin(), s.pages.end(), 0);
        const int64_t wanted = std::max<int64_t>(RECENT + 2, std::ceil(share * past)), others = past - 1 - RECENT;
        if (layer >= m.layers || wanted >= past) return;
        s.bound.resize(past);
        for (int64_t p = 1; p <= others; ++p) {
            const float *low = bounds + (b.pages[u.sequence * b.page_slots + p] * m.layers + layer) * bound_floats +
                               group * 2 * width,
                        *high = low + width;
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
        std::nth_element(first, cut, last, [&](int64_t x, int64_t y) {
            return s.bound[x] != s.bound[y] ? s.bound[x] > s.bound[y] : x < y;
        });
        std::sort(first, cut);
        s.pages.erase(cut, last);
    }

    void latent_attention(const Team& t, const Batch& b, int64_t index, const Layer& w, int64_t begin, int64_t end) {
        const int64_t half = m.rope / 2, both_sizes = m.nope + m.v_width;
        const int64_t own = w.token_latent ? m.token_rank : 0, made = m.rank - own;  // of the latent: the token's own
        multiply(t, w.kv_a, normed.rows, b.rows, kv.data(), entry);
        if (m.q_rank) {
            multiply(t, w.q_a, normed.rows, b.rows, low.rows.x, m.q_rank);
            t.wait();
            for (int64_t r = begin; r < end; ++r)
                norm_row(low, r, low.row(r), w.q_a_norm, m.q_rank, m.latent_eps, w.q_b.packed());
            t.wait();
            multiply(t, w.q_b, low.rows, b.rows, query.data(), query_size);
        } else {
            multiply(t, w.q, normed.rows, b.rows, query.data(), query_size);
        }
        t.wait();
        for (int64_t r = begin; r < end; ++r) {
            const int64_t position = row_position[r];
            float *mine = cache(row_sequence[r], position / PAGE, index, b) + position % PAGE * entry,
                  *from = kv.data() + r * entry;
            const float *cos = cosines.data() + r * half, *sin = sines.data() + r * half;
            rotate(from + made, cos, sin, half, m.interleave);
            rms_norm(mine, from, w.kv_a_norm, made, m.latent_eps);
            if (own) std::memcpy(mine + made, w.token_latent + b.tokens[r] * own, own * sizeof(float));
            std::memcpy(mine + m.rank, from + made, m.rope * sizeof(float));
            for (int64_t h = 0; h < m.heads; ++h) {
                float *q = query.data() + r * query_size + h * head_size,
                      *to = absorbed.data() + (r * m.heads + h) * entry;
                rotate(q + m.nope, cos, sin, half, m.interleave);
                for (int64_t i = 0; i < m.nope; ++i) q[i] *= (float)m.scale;
                for (int64_t i = 0; i < m.rope; ++i) to[m.rank + i] = q[m.nope + i] * (float)m.scale;
            }
        }
        t.wait();
        bound_filled(t, b, index);
        // W_UK moves into the query: heads attend over the latents themselves
        for_heads(t, b, [&](int64_t h, int64_t r, int64_t rows) {
            outer_product(query.data() + r * query_size + h * head_size, query_size, w.kv_b + h * both_sizes * m.rank,
                          m.rank, LANES, rows, m.nope, m.rank, absorbed.data() + (r * m.heads + h) * entry,
                          m.heads * entry, nullptr);
        });
        t.wait();
        for_units(t, index, [&](const Unit& u, AttentionScratch& s) {
            const int64_t queries = u.rows * u.heads;
            s.fit(queries, entry);
            for (int64_t i = 0; i < u.rows; ++i)
                std::memcpy(s.query.data() + i * u.heads * entry,
                            absorbed.data() + ((u.row + i) * m.heads + u.head) * entry,
                            u.heads * entry * sizeof(float));
            attend(s, b, u, index, queries, m.rank, 0, [&](const float* page, int64_t deepest) {
                all_dots(s.query.data(), entry, queries, page, entry, entry, 0, deepest, {s.score.data(), PAGE});
                return std::pair<const float*, int64_t>{page, entry};
            });
            for (int64_t i = 0; i < u.rows; ++i)
                for (int64_t h = 0; h < u.heads; ++h) {
                    const int64_t q = i * u.heads + h;
                    float *to = latent_mixed.data() + ((u.row + i) * m.heads + u.head + h) * m.rank,
                          *from = s.mixed.data() + q * m.rank;
                    for (int64_t k = 0; k < m.rank; ++k) to[k] = from[k] / s.total[q];
                }
        });
        t.wait();
        for_heads(t, b, [&](int64_t h, int64_t r, int64_t rows) {  // W_UV behind the softmax
            all_dots(latent_mixed.data() + (r * m.heads + h) * m.rank, m.heads * m.rank, rows,
                     w.kv_b + (h * both_sizes + m.nope) * m.rank, m.rank, m.rank, 0, m.v_width,
                     {mixed.row(r) + h * m.v_width, mixed.rows.width});
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
        for (int64_t i; (i = next_unit[index].fetch_add(1, std::memory_order_relaxed)) < (int64_t)units.size();)
            body(units[i], scratch[t.index]);
    }

    // All pages of a unit; keys(page, deepest) fills the scores and gives the values and their stride.
    template <class Keys>
    void attend(AttentionScratch& s, const Batch& b, const Unit& u, int64_t index, int64_t queries, int64_t width,
                int64_t group, Keys keys) {
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
            absorb_page(s, queries, values, stride, width, deepest,
                        [&](int64_t q) { return first + q / u.heads + 1 - page * PAGE; });
        }
    }

    // Where a head's key of a page's i-th token begins, its elements LANES apart; and where its value does. Keys lie
    // transposed, [kv_heads, PAGE / LANES, head, LANES]; values [kv_heads, PAGE, head].
    int64_t key_place(int64_t head, int64_t i) const {
        return head * head_size * PAGE + i / LANES * head_size * LANES + i % LANES;
    }
    int64_t value_place(int64_t head, int64_t i) const { return ((m.kv_heads + head) * PAGE + i) * head_size; }

    // Ask for the lines that row r's key and value will be written to: else every one of them is waited for. Always
    // inlined: to the compiler a function of prefetches alone does nothing, and is left out.
    __attribute__((always_inline)) void fetch_places(int64_t r, int64_t index, const Batch& b) const {
        const int64_t at = row_position[r] % PAGE;
        const float* page = cache(row_sequence[r], row_position[r] / PAGE, index, b);
        for (int64_t h = 0; h < m.kv_heads; ++h) {
            for (int64_t i = 0; i < head_size; ++i) __builtin_prefetch(page + key_place(h, at) + i * LANES, 1);
            for (int64_t i = 0; i < head_size; i += LANES) __builtin_prefetch(page + value_place(h, at) + i, 1);
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
            if (r + 1 < end) fetch_places(r + 1, index, b);
            for (int64_t h = 0; h < m.kv_heads; ++h) {
                float *k = kv.data() + r * kv_size + h * head_size, *to = page + key_place(h, at);
                if (w.k_norm) rms_norm(k, k, w.k_norm, head_size, m.norm_eps);
                rotate(k, cos, sin, half, false);
                for (int64_t i = 0; i < head_size; ++i) to[i * LANES] = k[i];
                std::memcpy(page + value_place(h, at), values + r * kv_size + h * head_size,
                            head_size * sizeof(float));
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
                std::memcpy(s.query.data() + i * size, query.data() + (u.row + i) * query_size + u.head * head_size,
                            size * sizeof(float));
            attend(s, b, u, index, queries, head_size, group, [&](const float* page, int64_t deepest) {
                outer_product(s.query.data(), head_size, page + key_place(group, 0), LANES, head_size * LANES, queries,
                              head_size, whole(deepest, LANES), s.score.data(), PAGE, nullptr);
                return std::pair<const float*, int64_t>{page + value_place(group, 0), head_size};
            });
            for (int64_t q = 0; q < queries; ++q) {
                float *to = mixed.row(u.row + q / u.heads) + (u.head + q % u.heads) * head_size,
                      *from = s.mixed.data() + q * head_size;
                for (int64_t k = 0; k < head_size; ++k) to[k] = from[k] / s.total[q];
            }
        });
    }
};
