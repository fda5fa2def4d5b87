// One forward pass of many sequences at once through the whole model, on pages, in one native call: every thread runs
// this function, takes its share of the work, and meets the others at barriers. native.py fills the structures;
// runner.py's PlainRunner is the twin.

#include "engram.h"
#include "sample.h"

struct Engine : Engram {
    using Engram::Engram;

    // One layer: the residual of every row, in place.
    void run_layer(const Team& t, const Batch& b, int64_t index) {
        const Layer& w = m.layer[index];
        int64_t begin, end;
        t.share(b.rows, begin, end);
        if (w.recall) recall(t, b, *w.recall, begin, end);
        read(w.attention_mixer, w.input_norm,
             w.kv_a.packed() || w.q_a.packed() || w.q.packed() || w.k.packed() || w.v.packed(), begin, end);
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
        write(begin, end);
        read(w.feed_forward_mixer, w.post_norm, w.gate.packed() || w.up.packed() || w.expert_gate_up.packed(), begin,
             end);
        if (w.router.kind) route(w, begin, end);
        t.wait();
        feed_forward(t, b, w, begin, end);
        t.wait();
        write(begin, end);
    }

    // --- after the layers
    // ------------------------------------------------------------------------------------------------

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
                const int64_t k = first + i, likely = most_likely(mine, m.vocabulary);
                if (d.logits) std::memcpy(d.logits + k * m.vocabulary, mine, m.vocabulary * sizeof(float));
                d.tokens[k] =
                    d.target && std::isfinite(mine[likely])
                        ? d.target[k]
                        : draw(mine, m.vocabulary, likely, d.temperature[k], d.top_p[k], (uint32_t)position(k),
                               d.keys + 4 * k);
                d.logprobs[k] = d.want_logprobs && d.tokens[k] >= 0
                                    ? log_probability(mine, m.vocabulary, d.tokens[k], mine[likely])
                                    : 0.0f;
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
            if (m.memory.layers) look_up(t, b);
            for (int64_t r = begin; r < end; ++r) embed(residual.data() + r * m.hidden, b.tokens[r]);
            enter(begin, end);
            if (m.memory.layers) t.wait();
            for (int64_t l = 0; l < m.layers; ++l) run_layer(t, b, l);
            t.wait();
            if (m.modules)  // a draft may need the state of any row
                for (int64_t r = begin; r < end; ++r) norm_state(r);
            else
                for (int64_t i = t.index; i < d.count; i += t.threads) norm_state(d.row[i]);
            t.wait();
            finish(
                t, d, [&](int64_t i) { return hidden.data() + d.row[i] * m.hidden; },
                [&](int64_t i) { return row_position[d.row[i]] + 1; });
        });
    }

    void norm_state(int64_t r) {
        leave(r, m.stream_head);
        rms_norm(hidden.data() + r * m.hidden, residual.data() + r * m.hidden, m.final_norm, m.hidden, m.norm_eps);
    }

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
            enter(begin, end);
            run_layer(t, b, m.layers);
            t.wait();
            std::vector<float> state(m.hidden);
            finish(
                t, d,
                [&](int64_t i) {
                    leave(d.row[i], w.head);
                    rms_norm(state.data(), residual.data() + d.row[i] * m.hidden, w.norm, m.hidden, m.norm_eps);
                    return state.data();
                },
                [&](int64_t i) {
                    return row_position[d.row[i]] + 2;
                });  // the row's own token, the one given, the one drawn
        });
    }
};

extern "C" {
Engine* engine_new(const Model* model) { return new Engine(*model); }
void engine_free(Engine* engine) { delete engine; }
void engine_pool(Engine* engine, float* pool, float* bounds, double share) {
    engine->pool = pool, engine->bounds = bounds, engine->share = share;
}
int64_t engine_bound_floats(const Engine* engine) { return engine->bound_floats * engine->m.layers; }
void engine_bound(Engine* engine, int64_t page) {  // after a full page was filled from elsewhere
    for (int64_t l = 0; l < engine->m.layers; ++l)
        for (int64_t h = 0; h < (engine->m.latent ? 1 : engine->m.kv_heads); ++h) engine->bound_page(page, l, h);
}
void engine_pages(Engine* engine, int64_t* read, int64_t* past) {
    *read = engine->pages_read.exchange(0), *past = engine->pages_past.exchange(0);
}
void engine_step(Engine* engine, const Batch* batch, const Draws* draws, int64_t threads) {
    engine->step(*batch, *draws, threads);
}
void engine_draft(Engine* engine, const Batch* batch, const int64_t* from, const Draws* draws, int64_t threads) {
    engine->draft(*batch, from, *draws, threads);
}

void panels_fill(const float* w, int64_t count, int64_t rows, int64_t columns, float* out) {
    fill_panels(w, count, rows, columns, out);
}

// One product by itself, for tests and measurements: x [rows, columns] -> out [rows, w.rows].
void matrix_product(const Matrix* w, const float* x, int64_t rows, float* out, int64_t threads) {
    Buffer in;
    in.fit(rows, w->columns);
    std::memcpy(in.rows.x, x, rows * w->columns * sizeof(float));
    together(threads, [&](const Team& t) {
        int64_t begin, end;
        t.share(rows, begin, end);
        if (w->packed())
            for (int64_t r = begin; r < end; ++r) round_row(in.rows, r);
        t.wait();
        t.share(w->rows, begin, end, PANEL);
        if (begin < end) product(*w, in.rows, rows, out, w->rows, false, begin, end);
    });
}
}
