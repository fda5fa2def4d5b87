// The draw of a token: Gumbel-max over the logits, with noise that depends on the seed, the position and the token
// alone. sampler.py is its twin and says how and why.

#pragma once
#include <algorithm>
#include <numeric>
#include <vector>
#include "vec.h"

// Philox4x32-10 (Salmon et al. 2011) for sixteen counters at once: words[4][16] for the counters first..first+15.
static void philox(uint32_t first, uint32_t position, const uint32_t* key, uint32_t words[4][LANES]) {
    uint32_t a[LANES], b[LANES], c[LANES], d[LANES], k0 = key[0], k1 = key[1];
    for (int i = 0; i < LANES; ++i) a[i] = first + i, b[i] = position, c[i] = key[2], d[i] = key[3];
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9, k1 += 0xBB67AE85)
        for (int i = 0; i < LANES; ++i) {
            uint64_t p = (uint64_t)a[i] * 0xD2511F53, q = (uint64_t)c[i] * 0xCD9E8D57;
            a[i] = uint32_t(q >> 32) ^ b[i] ^ k0, b[i] = (uint32_t)q;
            c[i] = uint32_t(p >> 32) ^ d[i] ^ k1, d[i] = (uint32_t)p;
        }
    std::memcpy(words[0], a, sizeof a), std::memcpy(words[1], b, sizeof b);
    std::memcpy(words[2], c, sizeof c), std::memcpy(words[3], d, sizeof d);
}

// A token's share of the stream: 64 tokens take four words of sixteen counters.
static uint32_t noise_bits(uint32_t token, uint32_t position, const uint32_t* key) {
    uint32_t words[4][LANES];
    philox((token >> 6 << 4), position, key, words);
    return words[token >> 4 & 3][token & 15];
}

static double gumbel(uint32_t bits) { return -std::log(-std::log1p(-(bits + 0.5) * 0x1p-32)); }

static int64_t most_likely(const float* logits, int64_t n) {
    int64_t best = 0;
    for (int64_t i = 0; i < n; ++i)
        if (logits[i] > logits[best]) best = i;
    return best;
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
            Vec limit = exponential((x - top) * (1.0f / temperature) - (float)leader + 1e-3f);
            for (int64_t i = 0; i < count; ++i)
                if (words[w][i] * 0x1p-32f <= limit[i]) consider(first + i, words[w][i]);
        }
    }
    return best;
}
