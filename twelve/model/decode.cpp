// One token through the whole model in one call, float32, batch 1: the fast twin of Transformer.forward for decoding.
//
// Decoding one token is bound by reading the weights once. Calling a library a hundred times a layer costs more than that,
// so all threads run this one function together, share out the rows of every product, and meet at a barrier between
// products. What is short (norms, routing) every thread does for itself, which is cheaper than another barrier.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#include <omp.h>
#include <sched.h>

// The order is the one in decode.py.
enum Slot {
    INPUT_NORM, POST_NORM, Q_A, Q_A_BIAS, Q_A_NORM, Q_B, Q, Q_BIAS, KV_A, KV_A_BIAS, KV_A_NORM, KV_B, K, K_BIAS, V, V_BIAS,
    Q_NORM, K_NORM, O, O_BIAS, ROUTER, ROUTER_BIAS, EXPERTS_GATE_UP, EXPERTS_DOWN, GATE, UP, DOWN, CACHE_0, CACHE_1, SLOTS
};

struct Shape {
    int64_t layers, hidden, vocabulary, threads;
    int64_t latent, heads, kv_heads, nope, rope, v_width, rank, q_rank, interleave;  // GQA: nope 0, rope = v_width = head
    int64_t experts, top_k, expert_width, groups, top_groups, group_best, softmax, normalise, gated_width_max;
    double norm_eps, latent_eps, scale, rope_scale, routed_scale;
};

using Layer = const float* const*;

static float dot(const float* a, const float* b, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
    return sum;
}

static void add_scaled(float* out, float scale, const float* x, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] += scale * x[i];
}

static void rms_norm(float* out, const float* x, const float* weight, int64_t n, double eps) {
    float scale = 1.0f / std::sqrt(dot(x, x, n) / n + (float)eps);
    for (int64_t i = 0; i < n; ++i) out[i] = x[i] * scale * weight[i];
}

static void softmax(float* x, int64_t n) {
    float top = x[0], sum = 0;
    for (int64_t i = 1; i < n; ++i) top = x[i] > top ? x[i] : top;
    for (int64_t i = 0; i < n; ++i) sum += x[i] = std::exp(x[i] - top);
    for (int64_t i = 0; i < n; ++i) x[i] /= sum;
}

// Rotate x [2 * half]: adjacent pairs come out split into halves, as in rope.py.
static void rotate(float* x, const float* cos, const float* sin, int64_t half, bool interleave, float* scratch) {
    for (int64_t i = 0; i < half; ++i) {
        float a = interleave ? x[2 * i] : x[i], b = interleave ? x[2 * i + 1] : x[half + i];
        scratch[i] = a * cos[i] - b * sin[i];
        scratch[half + i] = b * cos[i] + a * sin[i];
    }
    std::memcpy(x, scratch, 2 * half * sizeof(float));
}

// Threads meet here; spinning first, for a wait is usually shorter than a system call.
struct Barrier {
    std::atomic<int64_t> arrived{0}, round{0};
    int64_t count;
    void wait() {
        int64_t mine = round.load(std::memory_order_acquire);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
            arrived.store(0, std::memory_order_relaxed);
            round.store(mine + 1, std::memory_order_release);
            return;
        }
        for (int64_t spins = 0; round.load(std::memory_order_acquire) == mine; ++spins) {
            if (spins > 2000) sched_yield();
        }
    }
};

// One thread's view of the work.
struct Worker {
    const Shape& s;
    int64_t index, threads;
    Barrier& barrier;

    void share(int64_t n, int64_t& begin, int64_t& end) const { begin = n * index / threads, end = n * (index + 1) / threads; }

    // out[r] = weight[r] . x (+ bias[r]), this thread's share of the rows
    void product(float* out, const float* weight, const float* bias, const float* x, int64_t rows, int64_t columns) const {
        int64_t begin, end;
        share(rows, begin, end);
        for (int64_t r = begin; r < end; ++r) out[r] = dot(weight + r * columns, x, columns) + (bias ? bias[r] : 0.0f);
    }

    // The chosen experts and their gates, as Router in moe.py.
    void route(Layer w, const float* x, std::vector<int64_t>& chosen, std::vector<float>& gates) const {
        std::vector<float> score(s.experts), rank(s.experts);
        for (int64_t e = 0; e < s.experts; ++e) score[e] = dot(w[ROUTER] + e * s.hidden, x, s.hidden);
        if (s.softmax) softmax(score.data(), s.experts);
        else for (float& v : score) v = 1.0f / (1.0f + std::exp(-v));
        for (int64_t e = 0; e < s.experts; ++e) rank[e] = score[e] + (w[ROUTER_BIAS] ? w[ROUTER_BIAS][e] : 0.0f);
        if (s.top_groups < s.groups) {
            int64_t size = s.experts / s.groups;
            std::vector<float> group(s.groups, 0.0f);
            for (int64_t g = 0; g < s.groups; ++g) {
                std::vector<float> members(rank.begin() + g * size, rank.begin() + (g + 1) * size);
                for (int64_t b = 0; b < s.group_best && b < size; ++b) group[g] += take_best(members.data(), size).second;
            }
            std::vector<bool> kept(s.groups, false);
            for (int64_t b = 0; b < s.top_groups; ++b) kept[take_best(group.data(), s.groups).first] = true;
            for (int64_t e = 0; e < s.experts; ++e) if (!kept[e / size]) rank[e] = -INFINITY;
        }
        float total = 0;
        for (int64_t k = 0; k < s.top_k; ++k) {
            chosen[k] = take_best(rank.data(), s.experts).first;
            total += gates[k] = score[chosen[k]];
        }
        for (float& g : gates) g = g / (s.normalise ? total + 1e-20f : 1.0f) * (float)s.routed_scale;
    }

    static std::pair<int64_t, float> take_best(float* x, int64_t n) {
        int64_t best = 0;
        for (int64_t i = 1; i < n; ++i) if (x[i] > x[best]) best = i;
        float value = x[best];
        x[best] = -INFINITY;
        return {best, value};
    }

    // inner[j] = silu(gate[j] . x) * (up[j] . x), this thread's share
    void gated(float* inner, const float* gate, const float* up, const float* x, int64_t width) const {
        int64_t begin, end;
        share(width, begin, end);
        for (int64_t j = begin; j < end; ++j) {
            float g = dot(gate + j * s.hidden, x, s.hidden);
            inner[j] = g / (1.0f + std::exp(-g)) * dot(up + j * s.hidden, x, s.hidden);
        }
    }

    // Softmax attention of one head over n entries of the cache; out [v_width] is the mean of the first `values` elements.
    void attend(float* out, const float* query, const float* keys, int64_t key_stride, int64_t key_size,
                const float* values, int64_t value_stride, int64_t value_size, int64_t n, std::vector<float>& weights) const {
        for (int64_t i = 0; i < n; ++i) weights[i] = dot(query, keys + i * key_stride, key_size) * (float)s.scale;
        softmax(weights.data(), n);
        std::memset(out, 0, value_size * sizeof(float));
        for (int64_t i = 0; i < n; ++i) add_scaled(out, weights[i], values + i * value_stride, value_size);
    }
};

extern "C" void decode_token(const Shape* shape, const float* const* slots, const int64_t* dense_widths, const float* embedding,
                             const float* final_norm, const float* head, const float* frequencies, int64_t token,
                             int64_t position, float* logits) {
    const Shape& s = *shape;
    const int64_t head_size = s.nope + s.rope, half = s.rope / 2, entry = s.rank + s.rope;
    const int64_t query_size = s.heads * head_size, kv_size = s.kv_heads * head_size;
    std::vector<float> residual(embedding + token * s.hidden, embedding + (token + 1) * s.hidden);
    std::vector<float> query(query_size), low(s.q_rank), kv(s.latent ? entry : 2 * kv_size), mixed(s.heads * s.v_width);
    std::vector<float> inner((s.top_k + 1) * s.gated_width_max);
    Barrier barrier;

#pragma omp parallel num_threads(s.threads)
    {
#pragma omp single
        barrier.count = omp_get_num_threads();  // may be fewer than asked for
        Worker me{s, omp_get_thread_num(), omp_get_num_threads(), barrier};
        std::vector<float> x(s.hidden > s.q_rank ? s.hidden : s.q_rank), cos(half), sin(half), scratch(s.rope);
        std::vector<float> weights(position + 1), absorbed(entry), gates(s.top_k);
        std::vector<int64_t> chosen(s.top_k);
        for (int64_t i = 0; i < half; ++i) {
            float angle = (float)position * frequencies[i];
            cos[i] = std::cos(angle) * (float)s.rope_scale;
            sin[i] = std::sin(angle) * (float)s.rope_scale;
        }
        int64_t begin, end;
        for (int64_t l = 0; l < s.layers; ++l) {
            Layer w = slots + l * SLOTS;
            rms_norm(x.data(), residual.data(), w[INPUT_NORM], s.hidden, s.norm_eps);
            if (s.latent) {
                me.product(kv.data(), w[KV_A], w[KV_A_BIAS], x.data(), entry, s.hidden);
                if (s.q_rank) {
                    me.product(low.data(), w[Q_A], w[Q_A_BIAS], x.data(), s.q_rank, s.hidden);
                    barrier.wait();
                    rms_norm(x.data(), low.data(), w[Q_A_NORM], s.q_rank, s.latent_eps);
                    me.product(query.data(), w[Q_B], nullptr, x.data(), query_size, s.q_rank);
                } else {
                    me.product(query.data(), w[Q], nullptr, x.data(), query_size, s.hidden);
                }
                barrier.wait();
                float* cache = const_cast<float*>(w[CACHE_0]);
                if (me.index == 0) {
                    float* mine = cache + position * entry;
                    rms_norm(mine, kv.data(), w[KV_A_NORM], s.rank, s.latent_eps);
                    std::memcpy(mine + s.rank, kv.data() + s.rank, s.rope * sizeof(float));
                    rotate(mine + s.rank, cos.data(), sin.data(), half, s.interleave, scratch.data());
                }
                barrier.wait();
                me.share(s.heads, begin, end);
                std::vector<float> latent(s.rank);
                for (int64_t h = begin; h < end; ++h) {
                    float* q = query.data() + h * head_size;
                    const float* up = w[KV_B] + h * (s.nope + s.v_width) * s.rank;  // W_UK, then W_UV
                    std::fill(absorbed.begin(), absorbed.begin() + s.rank, 0.0f);
                    for (int64_t i = 0; i < s.nope; ++i) add_scaled(absorbed.data(), q[i], up + i * s.rank, s.rank);
                    rotate(q + s.nope, cos.data(), sin.data(), half, s.interleave, scratch.data());
                    std::memcpy(absorbed.data() + s.rank, q + s.nope, s.rope * sizeof(float));
                    me.attend(latent.data(), absorbed.data(), cache, entry, entry, cache, entry, s.rank, position + 1, weights);
                    for (int64_t i = 0; i < s.v_width; ++i)
                        mixed[h * s.v_width + i] = dot(up + (s.nope + i) * s.rank, latent.data(), s.rank);
                }
            } else {
                float *key = kv.data(), *value = kv.data() + kv_size;
                me.product(query.data(), w[Q], w[Q_BIAS], x.data(), query_size, s.hidden);
                me.product(key, w[K], w[K_BIAS], x.data(), kv_size, s.hidden);
                me.product(value, w[V], w[V_BIAS], x.data(), kv_size, s.hidden);
                barrier.wait();
                float *keys = const_cast<float*>(w[CACHE_0]), *values = const_cast<float*>(w[CACHE_1]);
                me.share(s.kv_heads, begin, end);
                for (int64_t h = begin; h < end; ++h) {
                    float* k = key + h * head_size;
                    if (w[K_NORM]) rms_norm(k, k, w[K_NORM], head_size, s.norm_eps);
                    rotate(k, cos.data(), sin.data(), half, false, scratch.data());
                    std::memcpy(keys + position * kv_size + h * head_size, k, head_size * sizeof(float));
                    std::memcpy(values + position * kv_size + h * head_size, value + h * head_size, head_size * sizeof(float));
                }
                barrier.wait();
                me.share(s.heads, begin, end);
                for (int64_t h = begin; h < end; ++h) {
                    float* q = query.data() + h * head_size;
                    int64_t at = h / (s.heads / s.kv_heads) * head_size;
                    if (w[Q_NORM]) rms_norm(q, q, w[Q_NORM], head_size, s.norm_eps);
                    rotate(q, cos.data(), sin.data(), half, false, scratch.data());
                    me.attend(mixed.data() + h * head_size, q, keys + at, kv_size, head_size, values + at, kv_size, head_size,
                              position + 1, weights);
                }
            }
            barrier.wait();
            const int64_t mixed_size = s.heads * s.v_width;
            me.share(s.hidden, begin, end);
            for (int64_t r = begin; r < end; ++r)
                residual[r] += dot(w[O] + r * mixed_size, mixed.data(), mixed_size) + (w[O_BIAS] ? w[O_BIAS][r] : 0.0f);
            barrier.wait();

            rms_norm(x.data(), residual.data(), w[POST_NORM], s.hidden, s.norm_eps);
            const int64_t routed = w[ROUTER] ? s.top_k : 0, wide = s.expert_width, dense = dense_widths[l];
            if (routed) me.route(w, x.data(), chosen, gates);
            for (int64_t k = 0; k < routed; ++k) {
                const float* gate = w[EXPERTS_GATE_UP] + chosen[k] * 2 * wide * s.hidden;
                me.gated(inner.data() + k * s.gated_width_max, gate, gate + wide * s.hidden, x.data(), wide);
            }
            float* shared = inner.data() + routed * s.gated_width_max;
            if (w[GATE]) me.gated(shared, w[GATE], w[UP], x.data(), dense);
            barrier.wait();
            for (int64_t r = begin; r < end; ++r) {
                float sum = w[GATE] ? dot(w[DOWN] + r * dense, shared, dense) : 0.0f;
                for (int64_t k = 0; k < routed; ++k)
                    sum += gates[k] * dot(w[EXPERTS_DOWN] + (chosen[k] * s.hidden + r) * wide, inner.data() + k * s.gated_width_max, wide);
                residual[r] += sum;
            }
            barrier.wait();
        }
        rms_norm(x.data(), residual.data(), final_norm, s.hidden, s.norm_eps);
        me.product(logits, head, nullptr, x.data(), s.vocabulary, s.hidden);
    }
}
