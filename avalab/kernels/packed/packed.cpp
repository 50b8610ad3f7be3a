// Products of a packed weight on a processor; the layout is that of `weight.py`, whose torch form is the definition.
//
// Sixteen rows of a weight are the lanes of a vector, and a word holds codes of one row: a column is one shift and one
// table look-up of 16 rows at once, multiplied by one activation that is broadcast from memory. No sum crosses lanes,
// activations need no order of their own, and a row block is read front to back once. Sums of a group are multiplied
// by its scale; what is added to every weight of a group is multiplied by the sum of its activations.
//
// Written in the compiler's vector extensions: only the look-up has a form for AVX-512 beside the plain one.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));

static const int LANES = 16, CHUNK = 32;

// A product that ends here is rounded here: no multiply-add with what follows.
#if defined(__AVX512F__)
#define ROUNDED(value) asm("" : "+v"(value))
#else
#define ROUNDED(value) asm("" : "+m"(value))
#endif

enum Dtype { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, INT8 = 3, UINT8 = 4 };

struct Factors {  // one number a row and group: `numbers`, times `multipliers` where there are any
    const void *numbers, *multipliers;
    int32_t dtype, multiplier_dtype;
    int64_t span;  // groups that share a number
};

struct Weight {
    const uint32_t *codes;
    const float *low, *high;  // 16 values each: of the lowest four bits of a code, and of those above
    Factors scales, minimums, zeros;
    int64_t rows, cols, group, padded;
    int32_t bits;
};

static inline float from_bfloat16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

static inline uint16_t to_bfloat16(float value) {  // to the nearest, ties to even; NaN stays NaN
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)((bits >> 16) | 64);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float from_float16(uint16_t bits) {
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, exponent = (bits >> 10) & 31, fraction = bits & 1023;
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * fraction * 0x1p-24f;
    uint32_t wide = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

static inline float number(const void *data, int dtype, int64_t at) {
    switch (dtype) {
        case FLOAT32: return ((const float *)data)[at];
        case BFLOAT16: return from_bfloat16(((const uint16_t *)data)[at]);
        case FLOAT16: return from_float16(((const uint16_t *)data)[at]);
        case INT8: return ((const int8_t *)data)[at];
        default: return ((const uint8_t *)data)[at];
    }
}

template <int D>
static inline F numbers(const void *data, int64_t at) {
    F found;
    for (int lane = 0; lane < LANES; lane++) found[lane] = number(data, D, at + lane);
    return found;
}

static inline F vector(const void *data, int dtype, int64_t at) {
    switch (dtype) {
        case FLOAT32: return numbers<FLOAT32>(data, at);
        case BFLOAT16: return numbers<BFLOAT16>(data, at);
        case FLOAT16: return numbers<FLOAT16>(data, at);
        case INT8: return numbers<INT8>(data, at);
        default: return numbers<UINT8>(data, at);
    }
}

static inline F factor(const Factors &f, int64_t group, int64_t padded, int64_t row) {
    F found = vector(f.numbers, f.dtype, group / f.span * padded + row);
    return f.multipliers ? found * vector(f.multipliers, f.multiplier_dtype, group * padded + row) : found;
}

// Scales of a row block, and what is added to its weights, group by group.
static inline void factors(const Weight &w, int64_t row, F *scale, F *offset) {
    int64_t groups = w.cols / w.group;
    for (int64_t g = 0; g < groups; g++) {
        scale[g] = factor(w.scales, g, w.padded, row);
        if (w.zeros.numbers) offset[g] = -factor(w.zeros, g, w.padded, row) * scale[g];
        if (w.minimums.numbers) offset[g] = factor(w.minimums, g, w.padded, row);
    }
}

#if defined(__AVX512F__)
static inline F lookup(F table, U index) { return (F)_mm512_permutexvar_ps((__m512i)index, (__m512)table); }
#elif defined(__AVX2__)
static inline F lookup(F table, U index) {  // eight rows twice, from both halves of the table; bit 3 chooses
    __m256 first, second, found[2];
    __m256i at[2];
    memcpy(&first, &table, 32);
    memcpy(&second, (const char *)&table + 32, 32);
    memcpy(at, &index, 64);
    for (int half = 0; half < 2; half++)
        found[half] = _mm256_blendv_ps(_mm256_permutevar8x32_ps(first, at[half]),
                                       _mm256_permutevar8x32_ps(second, at[half]),
                                       _mm256_castsi256_ps(_mm256_slli_epi32(at[half], 28)));
    F all;
    memcpy(&all, found, 64);
    return all;
}
#else
static __attribute__((noinline)) F lookup(F table, U index) {
    F found;
    for (int lane = 0; lane < LANES; lane++) found[lane] = table[index[lane] & 15];
    return found;
}
#endif

// Column c of a chunk's words for 16 rows; c is known when this is compiled, so shifts are immediate.
template <int B>
static inline __attribute__((always_inline)) F column(const U *words, int c, F low, F high) {
    if (B == 8) return __builtin_convertvector((I)(words[c / 4] << (24 - 8 * (c % 4))) >> 24, F);
    if (B == 4) return lookup(low, words[c / 8] >> (4 * (c % 8)));
    if (B == 2) return lookup(low, words[c / 16] >> (2 * (c % 16)));
    if (B == 3) {
        U third = c >= 2 ? words[2] >> (c - 2) : words[2] << (2 - c);
        return lookup(low, ((words[c / 16] >> (2 * (c % 16))) & 3) | (third & ~3u));
    }
    F four = lookup(low, words[c / 8] >> (4 * (c % 8)));
    if (B == 5) return four + lookup(high, words[4] >> c);
    U two = words[4 + c / 16] >> (2 * (c % 16));
    if (B == 6) return four + lookup(high, two);
    U third = c >= 2 ? words[6] >> (c - 2) : words[6] << (2 - c);
    return four + lookup(high, (two & 3) | (third & ~3u));
}

// y[m][row..row+16] of M rows of activations; S columns at a time share a scale (16, or a chunk of 32).
template <int B, int M, int S>
static void block(const Weight &w, int64_t row, const float *x, const float *sums, const F *scale, const F *offset,
                  F *y) {
    const int PARTS = M == 1 ? 8 : 2;  // sums that do not wait for each other
    int64_t groups = w.cols / w.group;
    const U *words = (const U *)w.codes + row / LANES * (w.cols / CHUNK) * B;
    F low, high;
    memcpy(&low, w.low, 64);
    memcpy(&high, w.high, 64);
    F total[M];
    for (int m = 0; m < M; m++) total[m] = F{};
    for (int64_t g = 0; g < groups; g++) {
        F part[M][PARTS];
        for (int m = 0; m < M; m++)
            for (int p = 0; p < PARTS; p++) part[m][p] = F{};
        for (int64_t at = g * w.group; at < (g + 1) * w.group; at += S) {
            const U *here = words + at / CHUNK * B;
            const float *in = x + at;
            if (S == CHUNK) {
#pragma GCC unroll 32
                for (int c = 0; c < CHUNK; c++) {
                    F value = column<B>(here, c, low, high);
#pragma GCC unroll 4
                    for (int m = 0; m < M; m++) part[m][c % PARTS] += value * in[m * w.cols + c];
                }
            } else {
                for (int c = 0; c < S; c++) {
                    F value = column<B>(here, at % CHUNK + c, low, high);
                    for (int m = 0; m < M; m++) part[m][c % PARTS] += value * in[m * w.cols + c];
                }
            }
        }
        for (int m = 0; m < M; m++) {
            for (int p = 1; p < PARTS; p++) part[m][0] += part[m][p];
            total[m] += part[m][0] * scale[g];
            if (sums) total[m] += offset[g] * sums[m * groups + g];
        }
    }
    for (int m = 0; m < M; m++) y[m] = total[m];
}

template <int B, int S>
static void blocks(const Weight &w, int64_t row, const float *x, const float *sums, int64_t batch, F *room, float *y) {
    int64_t groups = w.cols / w.group;
    F *scale = room, *offset = room + groups, found[4];
    factors(w, row, scale, offset);
    for (int64_t m = 0; m < batch;) {
        int64_t step = batch - m >= 4 ? 4 : 1;
        const float *in = x + m * w.cols, *sum = sums ? sums + m * groups : nullptr;
        if (step == 4) block<B, 4, S>(w, row, in, sum, scale, offset, found);
        else block<B, 1, S>(w, row, in, sum, scale, offset, found);
        int64_t width = w.rows - row < LANES ? w.rows - row : LANES;
        for (int64_t k = 0; k < step; k++) memcpy(y + (m + k) * w.rows + row, &found[k], width * 4);
        m += step;
    }
}

typedef void (*Blocks)(const Weight &, int64_t, const float *, const float *, int64_t, F *, float *);

static Blocks blocks_of(const Weight &w) {
    static const Blocks whole[] = {blocks<2, 32>, blocks<3, 32>, blocks<4, 32>, blocks<5, 32>,
                                   blocks<6, 32>, blocks<7, 32>, blocks<8, 32>};
    static const Blocks half[] = {blocks<2, 16>, blocks<3, 16>, blocks<4, 16>, blocks<5, 16>,
                                  blocks<6, 16>, blocks<7, 16>, blocks<8, 16>};
    return (w.group % CHUNK ? half : whole)[w.bits - 2];
}

static void sum_groups(const Weight &w, const float *x, int64_t batch, std::vector<float> &sums) {
    int64_t groups = w.cols / w.group;
    sums.resize(batch * groups);
    for (int64_t g = 0; g < batch * groups; g++) {
        F sum = F{};
        for (int64_t c = 0; c < w.group; c += LANES) {
            F part;
            memcpy(&part, x + g * w.group + c, 64);
            sum += part;
        }
        float all = 0;
        for (int lane = 0; lane < LANES; lane++) all += sum[lane];
        sums[g] = all;
    }
}

// y = x W^T of float32 activations, row blocks shared among threads; `sums` is room.
static void multiply(const Weight &w, const float *x, int64_t batch, float *y, int threads, std::vector<float> &sums) {
    bool added = w.zeros.numbers || w.minimums.numbers;
    if (added) sum_groups(w, x, batch, sums);
    Blocks run = blocks_of(w);
    int64_t count = w.padded / LANES, groups = w.cols / w.group;
    if (count * w.cols * LANES < 1 << 15) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        static thread_local std::vector<char> memory;
        memory.resize((2 * groups + 1) * sizeof(F));
        F *room = (F *)(((uintptr_t)memory.data() + 63) & ~(uintptr_t)63);
#pragma omp for schedule(static)
        for (int64_t at = 0; at < count; at++)
            run(w, at * LANES, x, added ? sums.data() : nullptr, batch, room, y);
    }
}

static void widen(const void *x, int bfloat16, int64_t count, std::vector<float> &wide) {
    wide.resize(count);
    for (int64_t at = 0; at < count; at++)
        wide[at] = bfloat16 ? from_bfloat16(((const uint16_t *)x)[at]) : ((const float *)x)[at];
}

typedef uint16_t N __attribute__((vector_size(32)));

static inline N narrow(F value) {  // as `to_bfloat16`, of numbers that are finite
    U bits = (U)value;
    return __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, N);
}

// Columns [first, last) of a row block, transposed; first begins a chunk.
template <int B, bool NARROW>
static void decode_block(const Weight &w, int64_t row, int64_t first, int64_t last, void *out, int64_t stride,
                         int64_t at) {
    const int half = w.group % CHUNK ? 16 : CHUNK;
    int64_t width = (w.rows - row < LANES ? w.rows - row : LANES) * (NARROW ? 2 : 4);
    char *to = (char *)out + at * (NARROW ? 2 : 4);
    F low, high, scale = F{}, zero = F{}, minimum = F{};
    memcpy(&low, w.low, 64);
    memcpy(&high, w.high, 64);
    for (int64_t c = first; c < last; c += CHUNK) {
        const U *words = (const U *)w.codes + (row / LANES * (w.cols / CHUNK) + c / CHUNK) * B;
#pragma GCC unroll 32
        for (int k = 0; k < CHUNK; k++) {
            if (k % half == 0) {
                int64_t g = (c + k) / w.group;
                scale = factor(w.scales, g, w.padded, row);
                if (w.zeros.numbers) zero = factor(w.zeros, g, w.padded, row);
                if (w.minimums.numbers) minimum = factor(w.minimums, g, w.padded, row);
            }
            F value = (column<B>(words, k, low, high) - zero) * scale;
            ROUNDED(value);
            value += minimum;
            if (NARROW) {
                N found = narrow(value);
                if (width == 32) memcpy(to, &found, 32); else memcpy(to, &found, width);
            } else {
                if (width == 64) memcpy(to, &value, 64); else memcpy(to, &value, width);
            }
            to += stride * (NARROW ? 2 : 4);
        }
    }
}

typedef void (*Decode)(const Weight &, int64_t, int64_t, int64_t, void *, int64_t, int64_t);

extern "C" {

int packed_lanes() { return LANES; }

// y[batch rows] = x[batch cols] W^T; activations and result are float32, or both bfloat16.
void packed_multiply(const Weight *w, const void *x, int64_t batch, int bfloat16, void *y, int threads) {
    static thread_local std::vector<float> wide, sums, result;
    if (!bfloat16) {
        multiply(*w, (const float *)x, batch, (float *)y, threads, sums);
        return;
    }
    widen(x, 1, batch * w->cols, wide);
    result.resize(batch * w->rows);
    multiply(*w, wide.data(), batch, result.data(), threads, sums);
    for (int64_t at = 0; at < batch * w->rows; at++) ((uint16_t *)y)[at] = to_bfloat16(result[at]);
}

// Columns [first, last) of row blocks [from, to), transposed: out[column - first][row - 16 from].
void packed_decode(const Weight *w, int64_t from, int64_t to, int64_t first, int64_t last, int bfloat16, void *out,
                   int64_t stride, int threads) {
    static const Decode wide[] = {decode_block<2, false>, decode_block<3, false>, decode_block<4, false>,
                                  decode_block<5, false>, decode_block<6, false>, decode_block<7, false>,
                                  decode_block<8, false>};
    static const Decode narrow[] = {decode_block<2, true>, decode_block<3, true>, decode_block<4, true>,
                                    decode_block<5, true>, decode_block<6, true>, decode_block<7, true>,
                                    decode_block<8, true>};
    Decode run = (bfloat16 ? narrow : wide)[w->bits - 2];
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t at = from; at < to; at++)
        run(*w, at * LANES, first, last, out, stride, (at - from) * LANES);
}

}  // extern "C"
