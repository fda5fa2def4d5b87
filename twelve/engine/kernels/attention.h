// Softmax attention over pages of 64 tokens, page after page from the first, whatever else runs beside it.

#pragma once
#include <numeric>
#include <vector>
#include "matmul.h"

constexpr int64_t PAGE = 64, TILE_QUERIES = 48;
constexpr int64_t RECENT = 4;  // pages before the newest token that selection never leaves out

// A few rows of one sequence and a few heads that share their keys: what one thread computes in one go.
struct Unit {
    int64_t sequence, row, rows, head, heads;
};

// What a thread needs while it computes a unit.
struct AttentionScratch {
    Array<float> query, score, mixed, top, total, keep, bound;
    std::vector<int64_t> pages;
    void fit(int64_t queries, int64_t width) {
        if (query.size() < (size_t)(queries * width)) query.resize(queries * width), mixed.resize(queries * width);
        if (top.size() < (size_t)queries)
            score.resize(queries * PAGE), top.resize(queries), total.resize(queries), keep.resize(queries);
    }
};

// One page into the running softmax of `queries` rows. valid(m) is how many tokens of the page query m may see,
// `deepest` the most of these; score [queries, 64] holds the raw scores, and the weights afterwards.
template <class Valid>
static void absorb_page(AttentionScratch& s, int64_t queries, const float* values, int64_t value_stride, int64_t width,
                        int64_t deepest, Valid valid) {
    const IVec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int64_t m = 0; m < queries; ++m) {
        float* score = s.score.data() + m * PAGE;
        const int32_t n = (int32_t)std::min(PAGE, std::max<int64_t>(0, valid(m)));
        Vec part[PAGE / LANES], top = splat(-INFINITY);
        for (int v = 0; v < PAGE / LANES; ++v) {
            part[v] = pick(lane + v * (int32_t)LANES < n, load(score + v * LANES), splat(-INFINITY));
            top = larger(top, part[v]);
        }
        const float before = s.top[m], now = std::max(before, largest(top));
        s.keep[m] = before == now ? 1.0f : exponential(splat(before - now))[0];
        Vec total{};
        for (int v = 0; v < PAGE / LANES; ++v) {
            Vec p = n ? exponential(part[v] - now) : Vec{};
            store(score + v * LANES, p);
            total += p;
        }
        s.top[m] = now;
        s.total[m] = s.total[m] * s.keep[m] + sum(total);
    }
    outer_product(s.score.data(), PAGE, values, value_stride, LANES, queries, deepest, width, s.mixed.data(),
                  width, s.keep.data());
}
