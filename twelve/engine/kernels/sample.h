// The draw of a token: Gumbel-max over the logits, with noise that depends on the seed, the position and the token
// alone. sampler.py is its twin and says how and why.

#pragma once
#include <algorithm>
#include <numeric>
#include <vector>
#include "../../model/kernels/vec.h"

typedef uint32_t UVec __attribute__((vector_size(64)));
typedef uint64_t Wide __attribute__((vector_size(64)));

INLINE Wide even_products(Wide x, uint32_t by) {  // of the lower words
#if defined(__AVX512F__)
    return (Wide)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(by));
#else
    return (x & 0xFFFFFFFF) * by;
#endif
}

// The high and low halves of the products of sixteen words with one.
INLINE void multiply_words(UVec x, uint32_t by, UVec& high, UVec& low) {
    Wide pairs;
    std::memcpy(&pairs, &x, sizeof x);
    const Wide even = even_products(pairs, by), odd = even_products(pairs >> 32, by),
               tops = (even >> 32) | (odd & 0xFFFFFFFF00000000);
    std::memcpy(&high, &tops, sizeof high);
    low = x * by;
}

// Philox4x32-10 (Salmon et al. 2011) for sixteen counters at once: words[4][16] for the counters first..first+15.
INLINE void philox(uint32_t first, uint32_t position, const uint32_t* key, uint32_t words[4][LANES]) {
    const UVec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    UVec a = lane + first, b = UVec{} + position, c = UVec{} + key[2], d = UVec{} + key[3];
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9, k1 += 0xBB67AE85) {
        UVec p, p_low, q, q_low;
        multiply_words(a, 0xD2511F53, p, p_low), multiply_words(c, 0xCD9E8D57, q, q_low);
        a = q ^ b ^ k0, b = q_low, c = p ^ d ^ k1, d = p_low;
    }
    const UVec all[4] = {a, b, c, d};
    std::memcpy(words, all, sizeof all);
}

// 2^-32 of sixteen words
INLINE Vec fractions(const uint32_t* words) {
    UVec w;
    std::memcpy(&w, words, sizeof w);
    return __builtin_convertvector(w, Vec) * 0x1p-32f;
}

// A token's share of the stream: 64 tokens take four words of sixteen counters.
static uint32_t noise_bits(uint32_t token, uint32_t position, const uint32_t* key) {
    uint32_t words[4][LANES];
    philox((token >> 6 << 4), position, key, words);
    return words[token >> 4 & 3][token & 15];
}

static double gumbel(uint32_t bits) { return -std::log(-std::log1p(-(bits + 0.5) * 0x1p-32)); }

// The first of the largest logits [n]; one that is no number, if there is any.
static int64_t most_likely(const float* logits, int64_t n) {
    float top = logits[0];
    int64_t i = 0;
    IVec strange{};
    if (n >= LANES) {
        Vec most = load(logits);
        for (; i + LANES <= n; i += LANES) {
            const Vec x = load(logits + i);
            most = larger(x, most), strange |= x != x;
        }
        for (int lane = 0; lane < LANES; ++lane) top = most[lane] > top ? most[lane] : top;
    }
    bool found = any(strange);
    for (; i < n; ++i) top = logits[i] > top ? logits[i] : top, found |= std::isnan(logits[i]);
    if (found) return std::find_if(logits, logits + n, [](float x) { return std::isnan(x); }) - logits;
    for (i = 0; i + LANES <= n && !any(load(logits + i) == top); i += LANES) continue;
    for (; i < n; ++i)
        if (logits[i] == top) return i;
    return 0;  // they are not numbers
}

// log softmax(logits)[token]
static double log_probability(const float* logits, int64_t n, int64_t token, float top) {
    double total = 0;
    for (int64_t i = 0; i < n; i += 256) {
        Vec part{};
        int64_t end = std::min(n, i + 256), k = i;
        for (; k + LANES <= end; k += LANES) part += exponential(load(logits + k) - top);
        for (; k < end; ++k) total += std::exp((double)logits[k] - top);
        total += sum(part);
    }
    return (double)logits[token] - top - std::log(total);
}

// The smallest set of most likely tokens that holds `top_p` of the probability.
static void nucleus(const float* logits, int64_t n, float top, double temperature, double top_p,
                    std::vector<int64_t>& kept) {
    std::vector<double> p(n);
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += p[i] = std::exp(((double)logits[i] - top) / temperature);
    kept.clear();
    for (int64_t i = 0; i < n; ++i)
        if (p[i] >= total * (1 - top_p) / (2 * n)) kept.push_back(i);  // the rest hold too little to matter together
    std::sort(kept.begin(), kept.end(), [&](int64_t a, int64_t b) { return p[a] != p[b] ? p[a] > p[b] : a < b; });
    double held = 0;
    size_t count = 0;
    while (count < kept.size() && held < top_p * total) held += p[kept[count++]];
    kept.resize(std::max<size_t>(count, 1));
}

// The token drawn from logits [n], of which `likely` is the most likely; -1 if they are not numbers.
static int64_t draw(const float* logits, int64_t n, int64_t likely, float temperature, float top_p, uint32_t position,
                    const uint32_t* key) {
    const float top = logits[likely];
    if (!std::isfinite(top)) return -1;
    if (temperature == 0) return likely;
    auto score = [&](int64_t token, uint32_t bits) {
        return ((double)logits[token] - top) / temperature + gumbel(bits);
    };
    int64_t best = likely;
    double leader = score(likely, noise_bits(likely, position, key));
    auto consider = [&](int64_t token, uint32_t bits) {
        double s = score(token, bits);
        if (s > leader || (s == leader && token < best)) leader = s, best = token;
    };
    if (top_p < 1) {
        std::vector<int64_t> kept;
        nucleus(logits, n, top, temperature, top_p, kept);
        for (int64_t token : kept) consider(token, noise_bits(token, position, key));
        return best;
    }
    for (int64_t block = 0; block < n; block += 64) {
        uint32_t words[4][LANES];
        philox(block >> 2, position, key, words);
        for (int64_t w = 0; w < 4 && block + w * LANES < n; ++w) {
            const int64_t first = block + w * LANES, count = std::min(LANES, n - first);
            Vec x = count == LANES ? load(logits + first) : load_some(logits + first, count);
            // -log(1 - v) >= v, so a token can only win if v < e^(logit / temperature - leader); with room for rounding
            Vec limit = exponential((x - top) * (1.0f / temperature) - (float)leader + 1e-3f), v = fractions(words[w]);
            if (!any(v <= limit)) continue;
            for (int64_t i = 0; i < count; ++i)
                if (v[i] <= limit[i]) consider(first + i, words[w][i]);
        }
    }
    return best;
}
