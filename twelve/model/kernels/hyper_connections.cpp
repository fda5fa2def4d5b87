// Hyper-connections in as few passes over the streams as there can be, forward and backward, in float32. The twin is
// hyper_connections.py, whose names these are. Sixteen tokens at a time: the long sums run along a token's numbers, the
// small mappings one token a lane.

#include "vec.h"
#include <algorithm>
#include <omp.h>

struct Rules {
    int64_t width, iterations, constrained, transposed;
    double lift, least, norm_eps;
};
struct Streams {
    int64_t tokens;
    const float *x, *fn, *base, *scale;
    float *state, *mixed, *post, *comb, *kept;  // kept: raw values and 1 / rms of every token
};
struct Gradients {
    const float *state, *mixed, *post;
    float *x, *fn, *base, *scale;
};

template <int N>
struct Block {
    static constexpr int C = (2 + N) * N, GROUP = C % 6 ? 4 : 6;  // outputs of the projection, and of one tile of it
    const Rules& rules;
    const Streams& s;
    int64_t first, count, length;
    alignas(64) float raw[C][LANES], inverse[LANES];
    Vec pre[N], post[N], comb[N][N], squashed[C];
    Array<Vec> sums_seen;  // divisors of every half-step of Sinkhorn-Knopp

    Block(const Rules& rules, const Streams& s) : rules(rules), s(s), length(N * rules.width) {
        sums_seen.resize(2 * rules.iterations * N);
    }
    void begin(int64_t block) {
        first = block * LANES;
        count = std::min(LANES, s.tokens - first);
    }
    int64_t token(int64_t lane) const { return first + std::min(lane, count - 1); }  // idle lanes repeat the last
    const float* streams(int64_t lane) const { return s.x + token(lane) * length; }

    void project() {
        for (int64_t lane = 0; lane < count; lane += 4) {
            const float* x[4];
            for (int t = 0; t < 4; ++t) x[t] = streams(std::min(lane + t, count - 1));
            for (int g = 0; g < C; g += GROUP) {
                Vec sum_of[4][GROUP] = {};
                for (int64_t k = 0; k < length; k += LANES) {
                    Vec some[4];
                    for (int t = 0; t < 4; ++t) some[t] = load(x[t] + k);
                    for (int c = 0; c < GROUP; ++c) {
                        Vec row = load(s.fn + (g + c) * length + k);
                        for (int t = 0; t < 4; ++t) sum_of[t][c] += some[t] * row;
                    }
                }
                for (int t = 0; t < 4; ++t)
                    for (int c = 0; c < GROUP; ++c) raw[g + c][lane + t] = sum(sum_of[t][c]);
            }
            for (int t = 0; t < 4; ++t) {
                Vec squares{};
                for (int64_t k = 0; k < length; k += LANES) squares += load(x[t] + k) * load(x[t] + k);
                inverse[lane + t] = 1 / std::sqrt(sum(squares) / length + (float)rules.norm_eps);
                for (int c = 0; c < C; ++c) raw[c][lane + t] *= inverse[lane + t];
            }
        }
    }
    void keep() const {
        for (int64_t lane = 0; lane < count; ++lane) {
            float* kept = s.kept + (first + lane) * (C + 1);
            for (int c = 0; c < C; ++c) kept[c] = raw[c][lane];
            kept[C] = inverse[lane];
        }
    }
    void recall() {
        for (int64_t lane = 0; lane < LANES; ++lane) {
            const float* kept = s.kept + token(lane) * (C + 1);
            for (int c = 0; c < C; ++c) raw[c][lane] = kept[c];
            inverse[lane] = kept[C];
        }
    }

    static constexpr int part(int c) { return c < N ? 0 : c < 2 * N ? 1 : 2; }
    int row(int c) const { return rules.transposed ? (c - 2 * N) % N : (c - 2 * N) / N; }  // of comb
    int column(int c) const { return rules.transposed ? (c - 2 * N) / N : (c - 2 * N) % N; }
    static Vec sigmoid(Vec z) {
        z = pick(z > 80.0f, splat(80), pick(z < -80.0f, splat(-80), z));
        return 1.0f / (1.0f + exponential(-z));
    }

    void coefficients() {
        for (int c = 0; c < C; ++c) {
            Vec value = load(raw[c]);
            squashed[c] = rules.constrained ? value : 2.0f * sigmoid(2.0f * value) - 1.0f;
            value = s.scale[part(c)] * squashed[c] + s.base[c];
            bool is_comb = part(c) == 2;
            if (rules.constrained && !is_comb) value = part(c) ? 2.0f * sigmoid(value) : sigmoid(value) + (float)rules.lift;
            (is_comb ? comb[row(c)][column(c)] : part(c) ? post[c - N] : pre[c]) = value;
        }
        if (rules.constrained) sinkhorn();
    }
    void sinkhorn() {
        for (int j = 0; j < N; ++j) {
            Vec top = comb[0][j], total{};
            for (int i = 1; i < N; ++i) top = larger(top, comb[i][j]);
            for (int i = 0; i < N; ++i) total += comb[i][j] = exponential(comb[i][j] - top);
            for (int i = 0; i < N; ++i) comb[i][j] = larger(comb[i][j] / total, splat(rules.least)) + (float)rules.lift;
        }
        for (int64_t step = 0; step < 2 * rules.iterations - 1; ++step)
            for (int a = 0; a < N; ++a) {  // even steps: rows
                Vec total = splat(rules.lift);
                for (int b = 0; b < N; ++b) total += step % 2 ? comb[b][a] : comb[a][b];
                sums_seen[step * N + a] = total;
                Vec by = 1.0f / total;
                for (int b = 0; b < N; ++b) (step % 2 ? comb[b][a] : comb[a][b]) *= by;
            }
    }
    // from the gradient of comb to that of its logits; comb goes back to where it began
    void sinkhorn_backward(Vec (&grad)[N][N]) {
        for (int64_t step = 2 * rules.iterations - 2; step >= 0; --step)
            for (int a = 0; a < N; ++a) {
                Vec total = sums_seen[step * N + a], by = 1.0f / total, inner{};
                for (int b = 0; b < N; ++b) inner += step % 2 ? grad[b][a] * comb[b][a] : grad[a][b] * comb[a][b];
                for (int b = 0; b < N; ++b) {
                    Vec& g = step % 2 ? grad[b][a] : grad[a][b];
                    g = (g - inner) * by;
                    (step % 2 ? comb[b][a] : comb[a][b]) *= total;
                }
            }
        for (int j = 0; j < N; ++j) {
            Vec inner{}, soft[N];
            for (int i = 0; i < N; ++i) {
                soft[i] = comb[i][j] - (float)rules.lift;
                soft[i] = pick(soft[i] > 1.001f * (float)rules.least, soft[i], Vec{});
                inner += grad[i][j] * soft[i];
            }
            for (int i = 0; i < N; ++i) grad[i][j] = soft[i] * (grad[i][j] - inner);
        }
    }

    void read() {
        const int64_t width = rules.width;
        for (int64_t lane = 0; lane < count; ++lane) {
            const int64_t token = first + lane;
            const float* x = s.x + token * length;
            float p[N], h[N][N];
            for (int i = 0; i < N; ++i) {
                p[i] = pre[i][lane];
                s.post[token * N + i] = post[i][lane];
                for (int j = 0; j < N; ++j) s.comb[(token * N + i) * N + j] = h[i][j] = comb[i][j][lane];
            }
            for (int64_t d = 0; d < width; d += LANES) {
                Vec some[N], state{};
                for (int j = 0; j < N; ++j) state += p[j] * (some[j] = load(x + j * width + d));
                store(s.state + token * width + d, state);
                for (int i = 0; i < N; ++i) {
                    Vec mixed{};
                    for (int j = 0; j < N; ++j) mixed += h[i][j] * some[j];
                    store(s.mixed + token * length + i * width + d, mixed);
                }
            }
        }
    }

    // --- backward -----------------------------------------------------------------------------------------------------

    alignas(64) float grad_pre[N][LANES], grad_comb[N][N][LANES], grad_raw[C][LANES], shrink[LANES];
    Vec grad_base[C], grad_scale[3];
    Array<float> grad_fn, idle;

    void begin_backward() {
        grad_fn.assign(C * length, 0.0f);
        idle.resize(length);
        std::fill_n(grad_base, C, Vec{});
        std::fill_n(grad_scale, 3, Vec{});
    }
    void backward(const Gradients& g) {
        recall();
        coefficients();
        Vec mappings[N][N], weights[N];
        std::memcpy(mappings, comb, sizeof comb);
        std::memcpy(weights, pre, sizeof pre);
        products(g);
        coefficients_backward(g);
        mix_backward(g, mappings, weights);
        project_backward(g);
    }
    void products(const Gradients& g) {
        const int64_t width = rules.width;
        for (int64_t lane = 0; lane < LANES; ++lane) {
            const float *x = streams(lane), *mixed = g.mixed + token(lane) * length, *state = g.state + token(lane) * width;
            Vec by_comb[N][N] = {}, by_pre[N] = {};
            for (int64_t d = 0; d < width; d += LANES) {
                Vec some[N], out = load(state + d);
                for (int j = 0; j < N; ++j) by_pre[j] += out * (some[j] = load(x + j * width + d));
                for (int i = 0; i < N; ++i) {
                    Vec grad = load(mixed + i * width + d);
                    for (int j = 0; j < N; ++j) by_comb[i][j] += grad * some[j];
                }
            }
            for (int i = 0; i < N; ++i) {
                grad_pre[i][lane] = sum(by_pre[i]);
                for (int j = 0; j < N; ++j) grad_comb[i][j][lane] = sum(by_comb[i][j]);
            }
        }
    }
    void coefficients_backward(const Gradients& g) {
        IVec lanes;
        for (int lane = 0; lane < LANES; ++lane) lanes[lane] = lane;
        const IVec live = lanes < isplat(count);
        Vec grad[N][N], of_post[N];
        for (int i = 0; i < N; ++i) {
            for (int lane = 0; lane < LANES; ++lane) of_post[i][lane] = g.post[token(lane) * N + i];
            for (int j = 0; j < N; ++j) grad[i][j] = load(grad_comb[i][j]);
        }
        if (rules.constrained) sinkhorn_backward(grad);
        Vec inner{};
        for (int c = 0; c < C; ++c) {
            Vec value = part(c) == 2 ? grad[row(c)][column(c)] : part(c) ? of_post[c - N] : load(grad_pre[c]);
            if (rules.constrained && part(c) < 2) {
                Vec open = part(c) ? 0.5f * post[c - N] : pre[c] - (float)rules.lift;
                value *= (part(c) ? 2.0f : 1.0f) * open * (1.0f - open);
            }
            value = pick(live, value, Vec{});
            grad_base[c] += value;
            grad_scale[part(c)] += value * squashed[c];
            value *= s.scale[part(c)];
            if (!rules.constrained) value *= 1.0f - squashed[c] * squashed[c];
            inner += value * load(raw[c]);
            store(grad_raw[c], value * load(inverse));
        }
        store(shrink, inner * load(inverse) * load(inverse) / (float)length);
    }
    void mix_backward(const Gradients& g, const Vec (&mappings)[N][N], const Vec (&weights)[N]) {
        const int64_t width = rules.width;
        for (int64_t lane = 0; lane < count; ++lane) {
            const float *x = streams(lane), *mixed = g.mixed + token(lane) * length, *state = g.state + token(lane) * width;
            float *out = g.x + token(lane) * length, p[N], h[N][N];
            for (int i = 0; i < N; ++i) {
                p[i] = weights[i][lane];
                for (int j = 0; j < N; ++j) h[i][j] = mappings[i][j][lane];
            }
            for (int64_t d = 0; d < width; d += LANES) {
                Vec some[N], read = load(state + d);
                for (int i = 0; i < N; ++i) some[i] = load(mixed + i * width + d);
                for (int j = 0; j < N; ++j) {
                    Vec grad = p[j] * read - shrink[lane] * load(x + j * width + d);
                    for (int i = 0; i < N; ++i) grad += h[i][j] * some[i];
                    store(out + j * width + d, grad);
                }
            }
        }
    }
    void project_backward(const Gradients& g) {
        const float* x[LANES];
        float* out[LANES];
        for (int64_t lane = 0; lane < LANES; ++lane) {
            x[lane] = streams(lane);
            out[lane] = lane < count ? g.x + (first + lane) * length : idle.data();
        }
        for (int64_t k = 0; k < length; k += 2 * LANES) {
            for (int64_t lane = 0; lane < count; lane += 8) {
                Vec grad[8][2];
                for (int t = 0; t < 8; ++t)
                    for (int v = 0; v < 2; ++v) grad[t][v] = load(out[lane + t] + k + v * LANES);
                for (int c = 0; c < C; ++c) {
                    Vec low = load(s.fn + c * length + k), high = load(s.fn + c * length + k + LANES);
                    for (int t = 0; t < 8; ++t) {
                        grad[t][0] += grad_raw[c][lane + t] * low;
                        grad[t][1] += grad_raw[c][lane + t] * high;
                    }
                }
                for (int t = 0; t < 8; ++t)
                    for (int v = 0; v < 2; ++v) store(out[lane + t] + k + v * LANES, grad[t][v]);
            }
            for (int c = 0; c < C; c += 8) {
                Vec grad[8][2];
                for (int e = 0; e < 8; ++e)
                    for (int v = 0; v < 2; ++v) grad[e][v] = load(&grad_fn[(c + e) * length + k + v * LANES]);
                for (int t = 0; t < LANES; ++t) {
                    Vec low = load(x[t] + k), high = load(x[t] + k + LANES);
                    for (int e = 0; e < 8; ++e) {
                        grad[e][0] += grad_raw[c + e][t] * low;
                        grad[e][1] += grad_raw[c + e][t] * high;
                    }
                }
                for (int e = 0; e < 8; ++e)
                    for (int v = 0; v < 2; ++v) store(&grad_fn[(c + e) * length + k + v * LANES], grad[e][v]);
            }
        }
    }
    void add_to(const Gradients& g) const {
        for (int64_t k = 0; k < C * length; ++k) g.fn[k] += grad_fn[k];
        for (int c = 0; c < C; ++c) g.base[c] += sum(grad_base[c]);
        for (int p = 0; p < 3; ++p) g.scale[p] += sum(grad_scale[p]);
    }
};

template <int N>
static void read_all(const Rules& rules, const Streams& s, int64_t threads) {
#pragma omp parallel num_threads(threads)
    {
        Block<N> block(rules, s);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < (s.tokens + LANES - 1) / LANES; ++b) {
            block.begin(b);
            block.project();
            block.keep();
            block.coefficients();
            block.read();
        }
    }
}

template <int N>
static void read_all_backward(const Rules& rules, const Streams& s, const Gradients& g, int64_t threads) {
#pragma omp parallel num_threads(threads)
    {
        Block<N> block(rules, s);
        block.begin_backward();
#pragma omp for schedule(static)
        for (int64_t b = 0; b < (s.tokens + LANES - 1) / LANES; ++b) {
            block.begin(b);
            block.backward(g);
        }
#pragma omp for ordered schedule(static, 1)
        for (int64_t t = 0; t < omp_get_num_threads(); ++t) {  // in this order, so that sums repeat
#pragma omp ordered
            block.add_to(g);
        }
    }
}

template <int N>
static void write_all(int64_t tokens, int64_t width, const float* mixed, const float* out, const float* post, float* x) {
    for (int64_t token = 0; token < tokens; ++token)
        for (int64_t d = 0; d < width; d += LANES) {
            Vec some = load(out + token * width + d);
            for (int i = 0; i < N; ++i) {
                int64_t at = (token * N + i) * width + d;
                store(x + at, load(mixed + at) + post[token * N + i] * some);
            }
        }
}

template <int N>
static void write_all_backward(
    int64_t tokens, int64_t width, const float* grad, const float* out, const float* post, float* grad_out,
    float* grad_post) {
    for (int64_t token = 0; token < tokens; ++token) {
        Vec by_post[N] = {};
        for (int64_t d = 0; d < width; d += LANES) {
            Vec some = load(out + token * width + d), total{};
            for (int i = 0; i < N; ++i) {
                Vec one = load(grad + (token * N + i) * width + d);
                by_post[i] += one * some;
                total += post[token * N + i] * one;
            }
            store(grad_out + token * width + d, total);
        }
        for (int i = 0; i < N; ++i) grad_post[token * N + i] = sum(by_post[i]);
    }
}

template <class Body>
static void share(int64_t tokens, int64_t threads, Body body) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < threads; ++t) body(tokens * t / threads, tokens * (t + 1) / threads);
}

extern "C" {
void streams_read(int64_t n, const Rules* rules, const Streams* s, int64_t threads) {
    (n == 4 ? read_all<4> : read_all<2>)(*rules, *s, threads);
}
void streams_read_backward(int64_t n, const Rules* rules, const Streams* s, const Gradients* g, int64_t threads) {
    (n == 4 ? read_all_backward<4> : read_all_backward<2>)(*rules, *s, *g, threads);
}
void streams_write(
    int64_t n, int64_t tokens, int64_t width, const float* mixed, const float* out, const float* post, float* x,
    int64_t threads) {
    share(tokens, threads, [&](int64_t a, int64_t b) {
        (n == 4 ? write_all<4> : write_all<2>)(
            b - a, width, mixed + a * n * width, out + a * width, post + a * n, x + a * n * width);
    });
}
void streams_write_backward(
    int64_t n, int64_t tokens, int64_t width, const float* grad, const float* out, const float* post, float* grad_out,
    float* grad_post, int64_t threads) {
    share(tokens, threads, [&](int64_t a, int64_t b) {
        (n == 4 ? write_all_backward<4> : write_all_backward<2>)(
            b - a, width, grad + a * n * width, out + a * width, post + a * n, grad_out + a * width, grad_post + a * n);
    });
}
}
