// Products with float32 (rows or panels), bfloat16 and packed 8- and 4-bit weights, and the two small products of
// attention.

#pragma once
#include <algorithm>
#include <cstdlib>
#include "../../model/kernels/vec.h"

#if defined(__AVX512F__)
constexpr int TILE_ROWS = 6;  // accumulators fill the 32 registers
#else
constexpr int TILE_ROWS = 2;
#endif
constexpr int64_t AHEAD =
    2048;  // bytes to fetch before they are needed: twice the speed of waiting for the hardware's guess
constexpr float OUTLIER = 5;               // times the root mean square of its block
constexpr int64_t PANEL = 16, BLOCK = 32;  // rows of a packed panel, columns of a block

static int64_t whole(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

enum Kind : int64_t { NONE, FLOAT32, BFLOAT16, PANELS, PACKED8, PACKED4 };  // PANELS: of float32

// A weight matrix [rows, columns], or a stack of them with a fixed distance between one and the next. The layout of
// packed ones is described in twelve/quantize.py.
struct Matrix {
    const void *weights, *scales;
    const float* bias;
    int64_t kind, rows, columns, group, has_low, weights_stride, scales_stride;  // strides in bytes

    Matrix at(int64_t index) const {
        Matrix one = *this;
        one.weights = (const char*)weights + index * weights_stride;
        if (scales) one.scales = (const char*)scales + index * scales_stride;
        return one;
    }
    bool packed() const { return kind >= PACKED8; }
};

// Rows of activations rounded to 8 bits a block of 32. Eight rows lie together, so that one address and fixed offsets
// reach them all: q [tiles, blocks, 8 chunks, 8 rows, 4 columns], scale and total [tiles, blocks, 8 rows].
constexpr int64_t TILE = 8;
struct Rounded {
    int8_t* q;
    float* scale;
    float* total;  // scale times the sum of the block's q
};
struct Rows {
    float* x;  // the rows as they are [rows, width]
    int64_t width;
    Rounded first, rest;  // the rest: what `first` leaves of blocks with an outlier; nothing elsewhere
    uint64_t* uneven;     // [rows, width / 2048 up]: a bit for each block that has a rest
    int64_t blocks() const { return width / BLOCK; }
    int64_t words() const { return (blocks() + 63) / 64; }
    // where row r's part of block b is, in blocks of one row: the index of its scale
    int64_t place(int64_t r, int64_t b) const { return (r / TILE * blocks() + b) * TILE + r % TILE; }
    static int64_t bytes(int64_t place) { return place / TILE * TILE * BLOCK + place % TILE * 4; }
};

// One block in 8 bits: scale = largest / 127, to the nearest, halves to even. x is left with what is lost.
INLINE void round_block(Vec& low, Vec& high, const Rounded& to, int64_t place) {
    typedef int8_t Bytes __attribute__((vector_size(16)));
    const Vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    const float top = largest(larger(larger(low, -low), larger(high, -high))), scale = top / 127.0f;
    const float inverse = top > 0 ? 127.0f / top : 0.0f;
    const IVec i = bits(low * inverse + shift) - bits(shift), j = bits(high * inverse + shift) - bits(shift);
    const Bytes p = __builtin_convertvector(i, Bytes), q = __builtin_convertvector(j, Bytes);
    int8_t* at = to.q + Rows::bytes(place);
    for (int c = 0; c < 4; ++c)
        std::memcpy(at + c * 4 * TILE, (char*)&p + 4 * c, 4),
            std::memcpy(at + (c + 4) * 4 * TILE, (char*)&q + 4 * c, 4);
    to.scale[place] = scale;
    to.total[place] = sum(__builtin_convertvector(i + j, Vec)) * scale;
    low = low - __builtin_convertvector(i, Vec) * scale;
    high = high - __builtin_convertvector(j, Vec) * scale;
}

// Round row r. A value far above its block's others would leave them few of the 8 bits: what is lost there is rounded
// again, and such blocks are multiplied twice.
static void round_row(const Rows& rows, int64_t r) {
    const float* x = rows.x + r * rows.width;
    std::memset(rows.uneven + r * rows.words(), 0, rows.words() * 8);
    for (int64_t b = 0; b < rows.blocks(); ++b) {
        Vec low = load(x + b * BLOCK), high = load(x + b * BLOCK + LANES);
        const float power = sum(low * low + high * high);
        const int64_t at = rows.place(r, b);
        round_block(low, high, rows.first, at);
        const float top = rows.first.scale[at] * 127.0f;
        if (top * top * BLOCK > OUTLIER * OUTLIER * power) {
            round_block(low, high, rows.rest, at);
            rows.uneven[r * rows.words() + b / 64] |= uint64_t(1) << b % 64;
        }
    }
}

// Where a product goes: out [rows, stride] = (or +=) product + bias. One type for all uses keeps the compiled code
// small.
struct Out {
    float* to;
    int64_t stride;
    const float* bias = nullptr;
    bool add = false;

    template <class V>
    void put(int64_t r, int64_t n, V y, int64_t width) const {
        float* at = to + r * stride + n;
        if (width == int64_t(sizeof y / sizeof(float))) {
            V more{}, old{};
            if (bias) std::memcpy(&more, bias + n, sizeof y);
            if (add) std::memcpy(&old, at, sizeof y);
            y = y + more + old;
            std::memcpy(at, &y, sizeof y);
        } else {
            for (int64_t i = 0; i < width; ++i) at[i] = y[i] + (bias ? bias[n + i] : 0.0f) + (add ? at[i] : 0.0f);
        }
    }
};

// --- float weights: every output is a dot product over the columns, sixteen lanes wide
// ---------------------------------

INLINE Vec widen(const float* p) { return load(p); }
INLINE Vec widen(const uint16_t* p) {  // bfloat16
    typedef uint16_t Halves __attribute__((vector_size(32)));
    Halves h;
    std::memcpy(&h, p, sizeof h);
    return from_bits(__builtin_convertvector(h, IVec) << 16);
}
INLINE Vec widen_some(const float* p, int64_t n) { return load_some(p, n); }
INLINE Vec widen_some(const uint16_t* p, int64_t n) {
    uint16_t h[LANES] = {};
    std::memcpy(h, p, n * sizeof *p);
    return widen(h);
}

// out [M, 4] = x [M, columns] . the four rows of weights
template <int M, class Weight>
static void dots(const float* x, int64_t x_stride, const Weight* const* w, int64_t columns, Vec4* out) {
    Vec acc[M][4] = {};
    int64_t k = 0;
    for (; k + LANES <= columns; k += LANES) {
        Vec a[M];
        for (int m = 0; m < M; ++m) a[m] = load(x + m * x_stride + k);
        for (int n = 0; n < 4; ++n) {
            if (M == 1) __builtin_prefetch((const char*)(w[n] + k) + AHEAD);
            Vec b = widen(w[n] + k);
            for (int m = 0; m < M; ++m) acc[m][n] += a[m] * b;
        }
    }
    if (k < columns)
        for (int n = 0; n < 4; ++n) {
            Vec b = widen_some(w[n] + k, columns - k);
            for (int m = 0; m < M; ++m) acc[m][n] += load_some(x + m * x_stride + k, columns - k) * b;
        }
    for (int m = 0; m < M; ++m) out[m] = sums(acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
}

// Calls body(r, std::integral_constant<int, M>) for stretches of M rows from r on: Most, then 4, 2 and 1 for what is
// left.
template <int Most, class Body>
INLINE void by_rows(int64_t rows, Body body) {
    int64_t r = 0;
    for (; r + Most <= rows; r += Most) body(r, std::integral_constant<int, Most>{});
    if constexpr (Most > 4)
        for (; r + 4 <= rows; r += 4) body(r, std::integral_constant<int, 4>{});
    if constexpr (Most > 2)
        for (; r + 2 <= rows; r += 2) body(r, std::integral_constant<int, 2>{});
    for (; r < rows; ++r) body(r, std::integral_constant<int, 1>{});
}

// out [rows, N] = x [rows, columns] . w [N, columns] for N in [begin, end)
template <class Weight>
static void all_dots(const float* x, int64_t x_stride, int64_t rows, const Weight* w, int64_t w_stride, int64_t columns,
                     int64_t begin, int64_t end, const Out& out) {
    const int64_t stretch = 64;  // weights that stay in the cache while all rows pass
    for (int64_t from = begin; from < end; from += stretch)
        by_rows<TILE_ROWS>(rows, [&](int64_t r, auto count) {
            constexpr int M = decltype(count)::value;
            for (int64_t n = from; n < std::min(end, from + stretch); n += 4) {
                Vec4 y[M];
                const Weight* row[4];
                for (int64_t i = 0; i < 4; ++i) row[i] = w + std::min(n + i, end - 1) * w_stride;
                dots<M>(x + r * x_stride, x_stride, row, columns, y);
                for (int m = 0; m < M; ++m) out.put(r + m, n, y[m], std::min<int64_t>(4, end - n));
            }
        });
}

// --- packed weights: whole numbers inside a block of 32, floats from block to block
// --------------------------------------

// sum[i] += four unsigned bytes of w, at 4i, times the four signed bytes of x
INLINE IVec dot4(IVec sum, BVec w, int32_t x) {
#if defined(__AVX512VNNI__)
    return (IVec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(x));
#elif defined(__AVX2__)
    __m256i half[2], into[2];
    std::memcpy(half, &w, sizeof half);
    std::memcpy(into, &sum, sizeof into);
    __m256i a = _mm256_cvtepi8_epi16(_mm_set1_epi32(x));
    for (int h = 0; h < 2; ++h) {  // 16-bit products, so that nothing saturates
        __m256i low = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_castsi256_si128(half[h])), a);
        __m256i high = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_extracti128_si256(half[h], 1)), a);
        __m256i both = _mm256_permute4x64_epi64(_mm256_hadd_epi32(low, high), 0xD8);
        into[h] = _mm256_add_epi32(into[h], both);
    }
    std::memcpy(&sum, into, sizeof sum);
    return sum;
#else
    int8_t a[4];
    std::memcpy(a, &x, 4);
    for (int i = 0; i < LANES; ++i)
        for (int j = 0; j < 4; ++j) sum[i] += w[4 * i + j] * a[j];
    return sum;
#endif
}

INLINE Vec halves(const uint16_t* p) {  // sixteen float16
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
    Vec v;
    __m256 low = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
           high = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1));
    std::memcpy(&v, &low, 32);
    std::memcpy((char*)&v + 32, &high, 32);
    return v;
#else
    Vec v;
    for (int i = 0; i < LANES; ++i) {
        uint32_t h = p[i], sign = (h & 0x8000) << 16, rest = h & 0x7fff, word;
        float f;
        if (rest >= 0x7c00) word = 0x7f800000 | (rest & 0x3ff) << 13;
        else word = rest << 13;
        std::memcpy(&f, &word, 4);
        v[i] = (sign ? -1.0f : 1.0f) * (rest >= 0x7c00 ? f : f * 0x1p112f);
    }
    return v;
#endif
}

// acc[m] += one block of a panel times the block of M rows at `place`
template <int M, int BITS, bool LOW>
INLINE void block_rows(const uint8_t* w, const uint16_t* scales, const Rounded& in, int64_t place, Vec* acc) {
    constexpr int CHAINS = M < 4 ? 2 : 1;  // few rows wait for their own sums: whole numbers may be added in any order
    const int8_t* q = in.q + Rows::bytes(place);
    IVec sum[CHAINS][M] = {};
    auto four = [&](int m, int chunk) {
        int32_t x;
        std::memcpy(&x, q + (chunk * TILE + m) * 4, 4);
        return x;
    };
    for (int c = 0; c < BITS; ++c) {
        BVec bytes;
        std::memcpy(&bytes, w + c * 64, 64);
        if constexpr (BITS == 4) {
            BVec first = bytes & 15, second = (bytes >> 4) & 15;
            for (int m = 0; m < M; ++m) sum[0][m] = dot4(sum[0][m], first, four(m, c));
            for (int m = 0; m < M; ++m) sum[CHAINS - 1][m] = dot4(sum[CHAINS - 1][m], second, four(m, 4 + c));
        } else {
            for (int m = 0; m < M; ++m) sum[c % CHAINS][m] = dot4(sum[c % CHAINS][m], bytes, four(m, c));
        }
    }
    // q is unsigned: a symmetric weight is scale * q - scale * half of the range
    const Vec d = halves(scales), low = LOW ? halves(scales + PANEL) : d * (float)-(1 << (BITS - 1));
    for (int m = 0; m < M; ++m) {
        // a whole number below 2^24: the conversion is exact
        const Vec y = __builtin_convertvector(CHAINS == 1 ? sum[0][m] : sum[0][m] + sum[CHAINS - 1][m], Vec);
        acc[m] += y * (d * in.scale[place + m]);
        acc[m] += low * in.total[place + m];
    }
}

// out[m] = sixteen outputs of row r + m: one panel times M rows of one tile
template <int M, int BITS, bool LOW>
static void panel_rows(const uint8_t* w, const uint16_t* scales, int64_t blocks, int64_t blocks_per_group,
                       const Rows& in, int64_t r, Vec* out) {
    const int64_t words = in.words();
    Vec acc[M] = {};
    uint64_t uneven = 0;  // of any row
    for (int64_t b = 0, left = blocks_per_group; b < blocks; ++b, --left, w += 64 * BITS, uneven >>= 1) {
        if (left == 0) left = blocks_per_group, scales += LOW ? 2 * PANEL : PANEL;
        if (b % 64 == 0)
            for (int m = 0; m < M; ++m) uneven |= in.uneven[(r + m) * words + b / 64];
        for (int c = 0; c < BITS; ++c) __builtin_prefetch(w + c * 64 + AHEAD);
        block_rows<M, BITS, LOW>(w, scales, in.first, in.place(r, b), acc);
        if (uneven & 1)
            for (int m = 0; m < M; ++m)
                if (in.uneven[(r + m) * words + b / 64] >> b % 64 & 1)
                    block_rows<1, BITS, LOW>(w, scales, in.rest, in.place(r + m, b), acc + m);
    }
    for (int m = 0; m < M; ++m) out[m] = acc[m];
}

template <int BITS, bool LOW>
static void packed_product(const Matrix& w, const Rows& in, int64_t rows, int64_t begin, int64_t end, const Out& out) {
    const int64_t blocks = w.columns / BLOCK, groups = w.columns / w.group, per = w.group / BLOCK;
    const int64_t stretch =
        std::max(TILE, (24 << 10) / in.width / TILE * TILE);  // rows that stay near while all weights pass
    for (int64_t from = 0; from < rows; from += stretch)
        for (int64_t p = begin / PANEL; p * PANEL < end; ++p) {
            const uint8_t* bytes = (const uint8_t*)w.weights + p * blocks * PANEL * BLOCK * BITS / 8;
            const uint16_t* scales = (const uint16_t*)w.scales + p * groups * PANEL * (LOW ? 2 : 1);
            by_rows<TILE>(std::min(stretch, rows - from), [&](int64_t r, auto count) {
                constexpr int M = decltype(count)::value;
                Vec y[M];
                panel_rows<M, BITS, LOW>(bytes, scales, blocks, per, in, from + r, y);
                for (int m = 0; m < M; ++m) out.put(from + r + m, p * PANEL, y[m], std::min(PANEL, w.rows - p * PANEL));
            });
        }
}

// --- float panels, [outputs / 16 up, columns, 16]: sixteen outputs at a time, no sums across lanes
// ----------------------------------

// out [count, rows / 16 up, columns, 16] = w [count, rows, columns]; what a last panel lacks stays as it was
static void fill_panels(const float* w, int64_t count, int64_t rows, int64_t columns, float* out) {
    const int64_t panels = whole(rows, PANEL) / PANEL;
#pragma omp parallel for
    for (int64_t p = 0; p < count * panels; ++p) {
        const int64_t first = p % panels * PANEL, have = std::min(PANEL, rows - first);
        const float* from = w + (p / panels * rows + first) * columns;
        float* to = out + p * columns * PANEL;
        for (int64_t k = 0; k < columns; ++k)
            for (int64_t i = 0; i < have; ++i) to[k * PANEL + i] = from[i * columns + k];
    }
}

// acc [M, V, 16] += a [M, depth] . b: row k of its v-th sixteen columns lies at b + k * b_stride + v * across
template <int M, int V>
INLINE void add_outer(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t across, int64_t depth,
                      Vec (&acc)[M][V]) {
    for (int64_t k = 0; k < depth; ++k) {
        Vec row[V];
        for (int v = 0; v < V; ++v) {
            const float* at = b + k * b_stride + v * across;
            if (M == 1) __builtin_prefetch((const char*)at + AHEAD);
            row[v] = load(at);
        }
        for (int m = 0; m < M; ++m) {
            Vec x = splat(a[m * a_stride + k]);
            for (int v = 0; v < V; ++v) acc[m][v] += x * row[v];
        }
    }
}

static void panel_product(const Matrix& w, const Rows& in, int64_t rows, int64_t begin, int64_t end, const Out& out) {
    const int64_t panel = w.columns * PANEL;
    auto some = [&](int64_t n, auto panels) {  // their weights stay in the cache while all rows pass
        constexpr int V = decltype(panels)::value;
        by_rows<TILE_ROWS>(rows, [&](int64_t r, auto count) {
            constexpr int M = decltype(count)::value;
            Vec y[M][V] = {};
            add_outer<M, V>(in.x + r * in.width, in.width, (const float*)w.weights + n / PANEL * panel, PANEL, panel,
                            w.columns, y);
            for (int m = 0; m < M; ++m)
                for (int v = 0; v < V; ++v)
                    out.put(r + m, n + v * PANEL, y[m][v], std::min(PANEL, end - n - v * PANEL));
        });
    };
    int64_t n = begin;
    for (; n + 3 * PANEL < end; n += 4 * PANEL) some(n, std::integral_constant<int, 4>{});
    for (; n + PANEL < end; n += 2 * PANEL) some(n, std::integral_constant<int, 2>{});
    if (n < end) some(n, std::integral_constant<int, 1>{});
}

// --- any weights
// ----------------------------------------------------------------------------------------------------------

// out = (or +=) in . w + bias, for the outputs [begin, end): begin a multiple of 16, end too or w.rows
static void product(const Matrix& w, const Rows& in, int64_t rows, float* to, int64_t stride, bool add, int64_t begin,
                    int64_t end) {
    const Out out{to, stride, w.bias, add};
    switch (w.kind) {
        case FLOAT32:
            return all_dots(in.x, in.width, rows, (const float*)w.weights, w.columns, w.columns, begin, end, out);
        case BFLOAT16:
            return all_dots(in.x, in.width, rows, (const uint16_t*)w.weights, w.columns, w.columns, begin, end, out);
        case PANELS:
            return panel_product(w, in, rows, begin, end, out);
        case PACKED8:
            return w.has_low ? packed_product<8, true>(w, in, rows, begin, end, out)
                             : packed_product<8, false>(w, in, rows, begin, end, out);
        case PACKED4:
            return w.has_low ? packed_product<4, true>(w, in, rows, begin, end, out)
                             : packed_product<4, false>(w, in, rows, begin, end, out);
    }
}

// out [M, N] = out * keep + a [M, depth] . b [depth, N], b as in `add_outer`; its rows may be read up to 15 floats
// beyond their end
template <int M, int V>
static void outer(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t across, int64_t depth,
                  float* out, int64_t out_stride, const float* keep, int64_t width) {
    Vec acc[M][V] = {};
    if (keep)
        for (int m = 0; m < M; ++m)
            for (int v = 0; v < V; ++v)
                acc[m][v] = load_some(out + m * out_stride + v * LANES, std::min(LANES, width - v * LANES)) * keep[m];
    add_outer<M, V>(a, a_stride, b, b_stride, across, depth, acc);
    for (int m = 0; m < M; ++m)
        for (int v = 0; v < V; ++v)
            store_some(out + m * out_stride + v * LANES, acc[m][v], std::min(LANES, width - v * LANES));
}

static void outer_product(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t across,
                          int64_t rows, int64_t depth, int64_t width, float* out, int64_t out_stride,
                          const float* keep) {
    for (int64_t n = 0, taken; n < width; n += taken) {
        const int64_t left = width - n;
        taken = left > 3 * LANES ? 4 * LANES : left > LANES ? 2 * LANES : LANES;
        by_rows<TILE_ROWS>(rows, [&](int64_t r, auto count) {
            constexpr int M = decltype(count)::value;
            const float *x = a + r * a_stride, *y = b + n / LANES * across, *kept = keep ? keep + r : nullptr;
            float* to = out + r * out_stride + n;
            if (taken == 4 * LANES) outer<M, 4>(x, a_stride, y, b_stride, across, depth, to, out_stride, kept, left);
            else if (taken == 2 * LANES) outer<M, 2>(x, a_stride, y, b_stride, across, depth, to, out_stride, kept, left);
            else outer<M, 1>(x, a_stride, y, b_stride, across, depth, to, out_stride, kept, left);
        });
    }
}
