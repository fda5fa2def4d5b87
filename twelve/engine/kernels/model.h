// What describe.py says of a model, and native.py of a pass's rows and draws. And memory for rows of activations.

#pragma once
#include "attention.h"

constexpr int64_t MOST_TAPS = 16, MOST_STREAMS = 16;

struct Mixer {  // hyper-connections: coefficients = scale * (fn . normed streams) + base
    Matrix fn;
    const float *base, *scale;
};

struct Recall {  // Engram, in a layer
    Matrix key, value;
    const float *gate_norm, *conv;  // [streams, hidden]; [streams, taps, hidden]: both with all norm weights in them
    int64_t index;                  // among such layers
};

struct Memory {  // Engram's table, and how tokens become rows of it
    int64_t layers, grams, heads, width, taps, reach, pad, kind, rounded;  // kind: FLOAT32, BFLOAT16, PACKED8
    const int64_t *primes, *offsets, *multipliers;  // [layers, grams - 1, heads], the same, [layers, grams]
    const int32_t* compressed;
    const void* rows;
    const float* scales;
};

struct Layer {
    const float *input_norm, *post_norm, *q_a_norm, *kv_a_norm, *q_norm, *k_norm, *kv_b, *token_latent, *router_bias;
    Matrix q_a, q_b, q, kv_a, k, v, o, router, gate, up, down, expert_gate_up, expert_down;
    Mixer attention_mixer, feed_forward_mixer;
    const Recall* recall;  // null: none
};

struct Module {  // multi-token prediction
    const float *enorm, *hnorm, *norm;
    Matrix eh_proj;
    Mixer head;
};

struct Model {
    int64_t layers, modules, hidden, vocabulary;
    int64_t latent, heads, kv_heads, nope, rope, v_width, rank, token_rank, q_rank,
        interleave;  // GQA: nope 0, rope = v_width = head
    int64_t experts, top_k, expert_width, groups, top_groups, group_best, softmax, normalise;
    int64_t streams, constrained, transposed, rounds;  // hyper-connections; rounds, tolerance: of Sinkhorn's algorithm
    double norm_eps, latent_eps, scale, rope_scale, routed_scale, lift, least, tolerance;
    Matrix embedding, head;
    Mixer stream_head;
    Memory memory;
    const float *final_norm, *frequencies;
    const Layer* layer;  // the main model's, then one for each module
    const Module* module;
};

// Rows of one forward pass: those of each sequence follow one another, and so do their positions.
struct Batch {
    int64_t rows, sequences, page_slots;
    const int64_t *tokens, *starts, *positions;  // [rows], [sequences + 1], [sequences]
    const int32_t* pages;                        // [sequences, page_slots]
    const int64_t* before;                       // [sequences, memory.reach]: tokens in front of the first row
    float* gates;                                // out [rows]: the memory's, zero at first; their mean
};

// What to do after the rows `row`: draw a token, or give the log-probability of `target`.
struct Draws {
    int64_t count, want_logprobs;
    const int64_t *row, *target;  // [count]; target may be null
    const float *temperature, *top_p;
    const uint32_t* keys;      // [count, 4]
    int64_t* tokens;           // out
    float *logprobs, *logits;  // out; logits [count, vocabulary] or null
};

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
        auto grow = [](auto& v, int64_t size) {
            if (v.size() < (size_t)size) v.resize(size);
        };
        grow(x, count * width + LANES), grow(uneven, count * words);
        for (auto& v : numbers) grow(v, tiled * blocks);
        for (auto& v : bytes) grow(v, tiled * blocks * BLOCK);
        rows = {x.data(),
                width,
                {bytes[0].data(), numbers[0].data(), numbers[1].data()},
                {bytes[1].data(), numbers[2].data(), numbers[3].data()},
                uneven.data()};
    }
    float* row(int64_t r) { return rows.x + r * rows.width; }
    Rows from(int64_t r) const {  // r: the first of a tile
        Rows part = rows;
        part.x += r * rows.width;
        for (Rounded* one : {&part.first, &part.rest})
            one->q += r * rows.width, one->scale += r * rows.blocks(), one->total += r * rows.blocks();
        part.uneven += r * rows.words();
        return part;
    }
    void copy_rounded(int64_t i, const Rows& from, int64_t r) {
        const bool uneven[2] = {true, std::any_of(from.uneven + r * from.words(), from.uneven + (r + 1) * from.words(),
                                                  [](uint64_t w) { return w; })};
        const Rounded *to[2] = {&rows.first, &rows.rest}, *other[2] = {&from.first, &from.rest};
        for (int part = 0; part < 2; ++part)
            for (int64_t b = 0; uneven[part] && b < rows.blocks(); ++b) {
                const int64_t here = rows.place(i, b), there = from.place(r, b);
                for (int c = 0; c < 8; ++c)
                    std::memcpy(to[part]->q + Rows::bytes(here) + c * 4 * TILE,
                                other[part]->q + Rows::bytes(there) + c * 4 * TILE, 4);
                to[part]->scale[here] = other[part]->scale[there], to[part]->total[here] = other[part]->total[there];
            }
        std::memcpy(rows.uneven + i * rows.words(), from.uneven + r * rows.words(), rows.words() * 8);
    }
};

static float take_best(std::vector<float>& x, int64_t begin, int64_t end, int64_t& best) {
    best = begin;
    for (int64_t i = begin + 1; i < end; ++i)
        if (x[i] > x[best]) best = i;
    float value = x[best];
    x[best] = -INFINITY;
    return value;
}
