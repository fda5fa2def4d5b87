// The feed-forward of a layer: dense, or routed and shared experts.

#pragma once
#include "attention_layers.h"

struct FeedForward : AttentionLayers {
    using AttentionLayers::AttentionLayers;

    // The chosen experts of rows [begin, end) and their gates, as Router in moe.py.
    void route(const Layer& w, int64_t begin, int64_t end) {
        std::vector<float> score(m.experts * std::max<int64_t>(0, end - begin)), rank(m.experts), group(m.groups);
        all_dots(normed.row(begin), m.hidden, end - begin, (const float*)w.router.weights, m.hidden, m.hidden, 0,
                 m.experts, {score.data(), m.experts});
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
                    for (int64_t i = 0; i < m.group_best && i < size; ++i)
                        group[g] += take_best(copy, g * size, (g + 1) * size, best);
                }
                std::vector<bool> kept(m.groups, false);
                for (int64_t i = 0; i < m.top_groups; ++i) take_best(group, 0, m.groups, best), kept[best] = true;
                for (int64_t e = 0; e < m.experts; ++e)
                    if (!kept[e / size]) rank[e] = -INFINITY;
            }
            float chosen_total = 0;
            for (int64_t k = 0; k < m.top_k; ++k) {
                take_best(rank, 0, m.experts, best);
                chosen[r * m.top_k + k] = best;
                chosen_total += gates[r * m.top_k + k] = s[best];
            }
            for (int64_t k = 0; k < m.top_k; ++k)
                gates[r * m.top_k + k] =
                    gates[r * m.top_k + k] / (m.normalise ? chosen_total + 1e-20f : 1.0f) * (float)m.routed_scale;
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
                for (int64_t k = 0; k < m.top_k; ++k)
                    copy_row(gathered, slot[r * m.top_k + k], normed, r, w.expert_gate_up.packed());
            t.wait();
            for_experts([&](int64_t e, int64_t from, int64_t count) {
                multiply(t, w.expert_gate_up.at(e), gathered.from(from), count, expert_both.data() + from * 2 * inside,
                         2 * inside);
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
                gated(expert_inner.row(i), expert_both.data() + i * 2 * inside,
                      expert_both.data() + i * 2 * inside + inside, inside);
                if (w.expert_down.packed()) round_row(expert_inner.rows, i);
            }
        }
        t.wait();
        if (wide) multiply(t, w.down, inner.rows, b.rows, residual.data(), m.hidden, true);
        if (!w.router.kind) return;
        for_experts([&](int64_t e, int64_t from, int64_t count) {
            multiply(t, w.expert_down.at(e), expert_inner.from(from), count, expert_out.data() + from * m.hidden,
                     m.hidden);
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
};
