// Sixteen floats at a time. The compiler's own vectors make one AVX-512 register of them, two of AVX2, four of NEON.
//
// Every function here and in the engine's kernels computes a row from that row alone, in an order that does not depend
// on how many other rows there are, how they are cut into tiles, or how many threads share them. That is the whole of
// exact mode.

#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

typedef float Vec __attribute__((vector_size(64)));
typedef int32_t IVec __attribute__((vector_size(64)));
typedef uint8_t BVec __attribute__((vector_size(64)));
typedef float Vec8 __attribute__((vector_size(32)));
typedef float Vec4 __attribute__((vector_size(16)));
constexpr int64_t LANES = 16;

// A vector that begins on a cache line, so that sixteen floats never straddle two.
template <class T>
struct OnLines {
    typedef T value_type;
    OnLines() = default;
    template <class U>
    OnLines(const OnLines<U>&) {}
    T* allocate(size_t n) { return (T*)::operator new(n * sizeof(T), std::align_val_t(64)); }
    void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
    template <class U>
    bool operator==(const OnLines<U>&) const {
        return true;
    }
    template <class U>
    bool operator!=(const OnLines<U>&) const {
        return false;
    }
};
template <class T>
using Array = std::vector<T, OnLines<T>>;

#define INLINE static inline __attribute__((always_inline))

INLINE Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
INLINE Vec splat(float x) { return x - Vec{}; }  // not +: that would have to turn -0 into 0
INLINE IVec isplat(int32_t x) { return IVec{} + x; }
INLINE IVec bits(Vec v) {
    IVec i;
    std::memcpy(&i, &v, sizeof i);
    return i;
}
INLINE Vec from_bits(IVec i) {
    Vec v;
    std::memcpy(&v, &i, sizeof v);
    return v;
}
INLINE Vec pick(IVec mask, Vec yes, Vec no) { return from_bits((mask & bits(yes)) | (~mask & bits(no))); }
INLINE bool any(IVec mask) {
    int64_t words[8], found = 0;
    std::memcpy(words, &mask, sizeof words);
    for (int64_t word : words) found |= word;
    return found;
}
INLINE Vec larger(Vec a, Vec b) { return pick(a > b, a, b); }

INLINE Vec load_some(const float* p, int64_t n) {  // the first n of sixteen, the rest zero
    if (n >= LANES) return load(p);
    Vec v{};
    std::memcpy(&v, p, n * sizeof(float));
    return v;
}
INLINE void store_some(float* p, Vec v, int64_t n) {
    if (n >= LANES) store(p, v);
    else std::memcpy(p, &v, n * sizeof(float));
}

INLINE Vec8 fold(Vec v) {
    return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
           __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
}
INLINE Vec4 fold(Vec8 v) {
    return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
}

// The sums of four vectors; each in the same order whichever of the four it is.
INLINE Vec4 sums(Vec a, Vec b, Vec c, Vec d) {
    Vec4 p = fold(fold(a)), q = fold(fold(b)), r = fold(fold(c)), s = fold(fold(d));
    Vec4 pq = __builtin_shufflevector(p, q, 0, 1, 4, 5) + __builtin_shufflevector(p, q, 2, 3, 6, 7);
    Vec4 rs = __builtin_shufflevector(r, s, 0, 1, 4, 5) + __builtin_shufflevector(r, s, 2, 3, 6, 7);
    return __builtin_shufflevector(pq, rs, 0, 2, 4, 6) + __builtin_shufflevector(pq, rs, 1, 3, 5, 7);
}
INLINE float sum(Vec a) {
    Vec4 v = fold(fold(a));
    return (v[0] + v[2]) + (v[1] + v[3]);
}
INLINE float largest(Vec v) {
    v = larger(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    v = larger(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3));
    v = larger(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1));
    return v[0] > v[1] ? v[0] : v[1];
}

// e^x to about 2e-7; e^88 above 88, and 0 below -87.
INLINE Vec exponential(Vec x) {
    x = pick(x > 88.0f, splat(88.0f), x);  // beyond, the exponent runs into the sign
    const Vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    Vec t = x * 1.44269504f + shift, n = t - shift;
    Vec r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    Vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    Vec y = from_bits(bits(p) + ((bits(t) - bits(shift)) << 23));
    return pick(x < -87.0f, Vec{}, y);
}

INLINE float dot(const float* a, const float* b, int64_t n) {
    Vec s{};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) s += load(a + i) * load(b + i);
    if (i < n) s += load_some(a + i, n - i) * load_some(b + i, n - i);
    return sum(s);
}
