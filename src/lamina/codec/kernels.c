/* Kernels of lamina.codec: compiled on first use by native.py, which also declares the types for ctypes.

   The formats are described in affine.py and lossless.py. Loops have fixed lengths, so that any compiler turns them
   into the vectors of the machine at hand; only what compilers cannot see has intrinsics, with a portable twin.
   Nothing here trusts a byte of a panel: values may be anything, every offset is held inside the panel. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AVX512VBMI2__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define EXPANDING 1
#endif

#define INLINE static inline __attribute__((always_inline))
#define ALIGNED __attribute__((aligned(64)))
#define SMALLER(a, b) ((a) < (b) ? (a) : (b))

enum { BF16, F16, F32 };

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE float from_bf16(uint16_t bits) { return float_of((uint32_t)bits << 16); }

INLINE uint16_t to_bf16(float value) {
    uint32_t bits = bits_of(value);
    uint16_t rounded = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
}

INLINE float from_f16(uint16_t half) {
    uint32_t bits = (uint32_t)(half & 0x7fff) << 13;
    float small = float_of(bits + (113u << 23)) - float_of(113u << 23);
    uint32_t usual = bits + (112u << 23) + (bits >= (0x7c00u << 13) ? 112u << 23 : 0);
    usual = bits < (0x400u << 13) ? bits_of(small) : usual;
    return float_of(usual | (uint32_t)(half & 0x8000) << 16);
}

INLINE uint16_t to_f16(float value) {
    uint32_t bits = bits_of(value), sign = bits & 0x80000000u, size = bits ^ sign;
    uint32_t odd = (size >> 13) & 1;
    uint32_t usual = (size - (112u << 23) + 0xfff + odd) >> 13;
    uint32_t small = bits_of(float_of(size) + float_of(126u << 23)) - (126u << 23);
    uint32_t great = size > 0x7f800000u ? 0x7e00u : 0x7c00u;
    uint32_t half = size >= 0x47800000u ? great : size < 0x38800000u ? small : usual;
    return (uint16_t)(half | sign >> 16);
}

/* Rounded once, to the type of the output. */
static __attribute__((noinline)) void put(const float *values, int64_t count, int type, void *out, int64_t at) {
    if (type == BF16)
        for (int64_t i = 0; i < count; i++) ((uint16_t *)out)[at + i] = to_bf16(values[i]);
    else if (type == F16)
        for (int64_t i = 0; i < count; i++) ((uint16_t *)out)[at + i] = to_f16(values[i]);
    else
        memcpy((float *)out + at, values, (size_t)count * 4);
}

/* ---- q4, q5, q6, q8 -------------------------------------------------------------------------------------------- */

#define GROUP 32 /* columns that share a scale in q4, q5 and q6 */
#define BLOCK 64 /* the same in q8 */
#define SPAN 256 /* columns that are decoded at a time, a multiple of both */

INLINE int64_t affine_bytes(int bits, int64_t columns) {
    if (bits == 8) return (columns + BLOCK - 1) / BLOCK * (2 + BLOCK);
    return 4 + (columns + GROUP - 1) / GROUP * (2 + GROUP / 8 * bits);
}

INLINE uint16_t load16(const uint8_t *at) {
    uint16_t value;
    memcpy(&value, at, 2);
    return value;
}

INLINE uint32_t load32(const uint8_t *at) {
    uint32_t value;
    memcpy(&value, at, 4);
    return value;
}

/* Compilers choose short vectors for loops that begin with bytes, so the width is said here; values are the same. */
#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX2__)
#define WIDTH 8
#else
#define WIDTH 4
#endif

typedef uint32_t words_t __attribute__((vector_size(4 * WIDTH)));
typedef int32_t integers_t __attribute__((vector_size(4 * WIDTH)));
typedef float floats_t __attribute__((vector_size(4 * WIDTH), may_alias));

INLINE words_t widen_bytes(const uint8_t *from) {
#if defined(__AVX512F__)
    return (words_t)_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)from));
#elif defined(__AVX2__)
    return (words_t)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)from));
#else
    return (words_t){from[0], from[1], from[2], from[3]};
#endif
}

/* WIDTH codes about zero become values. */
INLINE void scale_codes(integers_t codes, float scale, float centre, float *out) {
    floats_t values = __builtin_convertvector(codes, floats_t) * scale + centre;
    memcpy(out, &values, sizeof values);
}

/* Columns [first, first + count) of a row as fp32; first is a multiple of SPAN, whole groups are written. */
INLINE void span_of_blocks(const uint8_t *row, int64_t columns, int64_t first, int64_t count, float *restrict out) {
    int64_t blocks = (columns + BLOCK - 1) / BLOCK;
    for (int64_t block = first / BLOCK; block * BLOCK < first + count; block++, out += BLOCK) {
        float scale = from_bf16(load16(row + 2 * block));
        const uint8_t *codes = row + 2 * blocks + BLOCK * block;
        for (int i = 0; i < BLOCK; i += WIDTH) {
            integers_t signed_codes = (integers_t)(widen_bytes(codes + i) << 24) >> 24;
            floats_t values = __builtin_convertvector(signed_codes, floats_t) * scale;
            memcpy(out + i, &values, sizeof values);
        }
    }
}

INLINE void span(int bits, const uint8_t *row, int64_t columns, int64_t first, int64_t count, float *restrict out) {
    if (bits == 8) {
        span_of_blocks(row, columns, first, count, out);
        return;
    }
    int64_t groups = (columns + GROUP - 1) / GROUP;
    float scale_unit = from_bf16(load16(row)), centre_unit = from_bf16(load16(row + 2));
    const uint8_t *scales = row + 4, *centres = scales + groups, *nibbles = centres + groups;
    const uint8_t *high = nibbles + 16 * groups;
    words_t lane;
    for (uint32_t i = 0; i < WIDTH; i++) lane[i] = i;
    for (int64_t group = first / GROUP; group * GROUP < first + count; group++, out += GROUP) {
        float scale = scale_unit * (float)scales[group], centre = centre_unit * (float)(int8_t)centres[group];
        uint32_t left = 0, right = 0;
        if (bits == 5) left = load32(high + 4 * group), right = left >> 16;
        if (bits == 6) left = load32(high + 8 * group), right = load32(high + 8 * group + 4);
        for (uint32_t i = 0; i < 16; i += WIDTH) {
            words_t both = widen_bytes(nibbles + 16 * group + i), a = both & 15, b = both >> 4;
            if (bits == 5) a |= left >> (lane + i) << 4 & 16, b |= right >> (lane + i) << 4 & 16;
            if (bits == 6) a |= left >> 2 * (lane + i) << 4 & 48, b |= right >> 2 * (lane + i) << 4 & 48;
            scale_codes((integers_t)a - (1 << (bits - 1)), scale, centre, out + i);
            scale_codes((integers_t)b - (1 << (bits - 1)), scale, centre, out + 16 + i);
        }
    }
}

#define ROW_DECODER(bits)                                                                                              \
    static void span_##bits(const uint8_t *row, int64_t columns, int64_t first, int64_t count, float *out) {           \
        span(bits, row, columns, first, count, out);                                                                   \
    }
ROW_DECODER(4)
ROW_DECODER(5)
ROW_DECODER(6)
ROW_DECODER(8)

typedef void (*span_t)(const uint8_t *, int64_t, int64_t, int64_t, float *);

static span_t span_for(int bits) { return bits == 4 ? span_4 : bits == 5 ? span_5 : bits == 6 ? span_6 : span_8; }

void lamina_affine_decode(const uint8_t *panels, int64_t rows, int64_t columns, int32_t bits, int32_t type, void *out,
                          int32_t threads) {
    int64_t bytes = affine_bytes(bits, columns);
    span_t decode = span_for(bits);
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads) if (rows * columns > 65536)
    for (int64_t row = 0; row < rows; row++) {
        float values[SPAN] ALIGNED;
        for (int64_t first = 0; first < columns; first += SPAN) {
            int64_t count = SMALLER(columns - first, SPAN);
            decode(panels + row * bytes, columns, first, count, values);
            put(values, count, type, out, row * columns + first);
        }
    }
}

/* ---- linear ---------------------------------------------------------------------------------------------------- */

/* A sum has sixteen lanes, lane i adding the products of columns i, i + 16, i + 32... one after another, whatever
   else is computed beside it. So its bits depend neither on the other tokens nor on which rows are in the call. */

#define LANES 16
#define TILE_ROWS 4
#define TOKENS_MAX 64

#if defined(__AVX512F__)
/* Else gcc reads a token's value once for each row again, and reading is what limits this loop. */
#define KEEP(vector) __asm__("" : "+v"(vector))
#define TILE_TOKENS 4
#else
#define KEEP(vector)
#define TILE_TOKENS 2 /* what sixteen registers hold */
#endif

/* Adds to sums[tokens][TILE_ROWS][LANES]. */
INLINE void tile(int tokens, const float *x, const float *weights, int64_t count, float *sums) {
    for (int lane = 0; lane < LANES; lane += WIDTH) {
        floats_t sum[TILE_TOKENS * TILE_ROWS];
#pragma GCC unroll 16
        for (int i = 0; i < tokens * TILE_ROWS; i++) sum[i] = *(const floats_t *)(sums + i * LANES + lane);
        for (int64_t k = lane; k < count; k += LANES) {
            floats_t weight[TILE_ROWS];
#pragma GCC unroll 4
            for (int r = 0; r < TILE_ROWS; r++) weight[r] = *(const floats_t *)(weights + r * SPAN + k);
#pragma GCC unroll 4
            for (int t = 0; t < tokens; t++) {
                floats_t value = *(const floats_t *)(x + t * SPAN + k);
                KEEP(value);
#pragma GCC unroll 4
                for (int r = 0; r < TILE_ROWS; r++) sum[t * TILE_ROWS + r] += weight[r] * value;
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < tokens * TILE_ROWS; i++) *(floats_t *)(sums + i * LANES + lane) = sum[i];
    }
}

static __attribute__((noinline)) void tile_of_one(const float *x, const float *weights, int64_t count,
                                                  float *sums) {
    tile(1, x, weights, count, sums);
}

static __attribute__((noinline)) void tile_of_some(const float *x, const float *weights, int64_t count,
                                                   float *sums) {
    tile(TILE_TOKENS, x, weights, count, sums);
}

INLINE float total(const float *sum) {
    float lanes[LANES];
    memcpy(lanes, sum, sizeof lanes);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
}

/* Rows [row, row + number) of the weights times every token. */
static void linear_rows(span_t decode, int64_t bytes, const uint8_t *panels, int64_t row, int number, int64_t columns,
                        const float *x, int64_t tokens, int type, void *out, int64_t out_stride) {
    float weights[TILE_ROWS * SPAN] ALIGNED;
    float sums[TOKENS_MAX * TILE_ROWS * LANES] ALIGNED;
    memset(weights, 0, sizeof weights);
    memset(sums, 0, (size_t)tokens * TILE_ROWS * LANES * sizeof *sums);
    for (int64_t first = 0; first < columns; first += SPAN) {
        int64_t count = SMALLER(columns - first, SPAN), t = 0;
        for (int r = 0; r < number; r++)
            decode(panels + (row + r) * bytes, columns, first, count, weights + r * SPAN);
        for (; t + TILE_TOKENS <= tokens; t += TILE_TOKENS)
            tile_of_some(x + t * SPAN, weights, count, sums + t * TILE_ROWS * LANES);
        for (; t < tokens; t++) tile_of_one(x + t * SPAN, weights, count, sums + t * TILE_ROWS * LANES);
        x += tokens * SPAN;
    }
    for (int64_t t = 0; t < tokens; t++)
        for (int r = 0; r < number; r++) {
            float value = total(sums + (t * TILE_ROWS + r) * LANES);
            put(&value, 1, type, out, t * out_stride + row + r);
        }
}

/* x as fp32 in spans of columns, padded by zeros: [spans][tokens][SPAN]. What a tile reads lies close together then;
   tokens that are a power of two apart would push each other out of the first cache. */
static void widen(const void *x, int type, int64_t tokens, int64_t columns, float *wide) {
    for (int64_t first = 0; first < columns; first += SPAN)
        for (int64_t t = 0; t < tokens; t++, wide += SPAN) {
            int64_t count = SMALLER(columns - first, SPAN);
            const uint16_t *half = (const uint16_t *)x + t * columns + first;
            if (type == BF16)
                for (int64_t i = 0; i < count; i++) wide[i] = from_bf16(half[i]);
            else if (type == F16)
                for (int64_t i = 0; i < count; i++) wide[i] = from_f16(half[i]);
            else
                memcpy(wide, (const float *)x + t * columns + first, (size_t)count * 4);
            memset(wide + count, 0, (size_t)(SPAN - count) * 4);
        }
}

/* 0, or 1 where there is no memory for x in fp32. */
int32_t lamina_affine_linear(const void *x, int64_t tokens, const uint8_t *panels, int64_t rows, int64_t columns,
                             int32_t bits, int32_t type, void *out, int64_t out_stride, int32_t threads) {
    int64_t bytes = affine_bytes(bits, columns);
    span_t decode = span_for(bits);
    if (tokens > TOKENS_MAX) return 1;
    float *wide = aligned_alloc(64, (size_t)((columns + SPAN - 1) / SPAN * SPAN * tokens) * 4);
    if (!wide) return 1;
    widen(x, type, tokens, columns, wide);
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads) if (rows * columns > 65536)
    for (int64_t row = 0; row < rows; row += TILE_ROWS) {
        int number = (int)SMALLER(rows - row, TILE_ROWS);
        linear_rows(decode, bytes, panels, row, number, columns, wide, tokens, type, out, out_stride);
    }
    free(wide);
    return 0;
}

/* ---- encoding -------------------------------------------------------------------------------------------------- */

/* Sixteen groups at a time, one to a lane. The sums are those of whole numbers below 2^24: exact, so that it does not
   matter here whether the compiler fuses a product into a sum. */

#define REACH 8191.0f /* as in fitting.py */
#define TINY 1e-33f

typedef struct {
    float number[LANES], squares[LANES], products[LANES];
} sums_t;

INLINE sums_t sum_codes(float x[GROUP][LANES], float step, float origin, int bits) {
    sums_t sums = {{0}, {0}, {0}};
    float factor = 1 / step, most = (float)((1 << (bits - 1)) - 1);
    for (int i = 0; i < GROUP; i++)
        for (int g = 0; g < LANES; g++) {
            float code = rintf((x[i][g] - origin) * factor);
            code = code > most ? most : code;
            code = code < -most - 1 ? -most - 1 : code;
            sums.number[g] += code;
            sums.squares[g] += code * code;
            sums.products[g] += code * x[i][g];
        }
    return sums;
}

/* See _search in fitting.py: found is [4][groups]. */
static void search_lanes(const float *rows, const float *middle, const float *factor, const float *ranges,
                         int32_t *found, int64_t groups, int64_t first, int32_t tries, int32_t bits) {
    float x[GROUP][LANES] = {{0}}, best[LANES], totals[LANES] = {0};
    int number = (int)SMALLER(groups - first, LANES);
    for (int g = 0; g < number; g++)
        for (int i = 0; i < GROUP; i++)
            x[i][g] = rintf((rows[(first + g) * GROUP + i] - middle[first + g]) * factor[first + g]);
    for (int i = 0; i < GROUP; i++)
        for (int g = 0; g < LANES; g++) totals[g] += x[i][g];
    for (int g = 0; g < LANES; g++) best[g] = -1;
    for (int try = 0; try < tries; try++) {
        sums_t sums = sum_codes(x, ranges[2 * try], ranges[2 * try + 1], bits);
        for (int g = 0; g < number; g++) {
            int32_t sum = (int32_t)sums.number[g], total = (int32_t)totals[g];
            int32_t shared = 32 * (int32_t)sums.products[g] - sum * total;
            int32_t spread = 32 * (int32_t)sums.squares[g] - sum * sum;
            float gain = (float)shared / (float)(spread > 1 ? spread : 1) * (float)shared;
            if (!(gain > best[g])) continue;
            best[g] = gain;
            found[first + g] = sum;
            found[groups + first + g] = total;
            found[2 * groups + first + g] = shared;
            found[3 * groups + first + g] = spread;
        }
    }
}

/* The codes of a group as bytes of its planes. */
static void pack_group(const float *x, float scale, float centre, int bits, uint8_t *low, uint8_t *high) {
    float factor = scale > TINY ? 1 / scale : 0, half = (float)(1 << (bits - 1));
    uint8_t codes[GROUP];
    uint64_t top = 0;
    for (int i = 0; i < GROUP; i++) {
        float code = rintf((x[i] - centre) * factor);
        code = code > half - 1 ? half - 1 : code;
        code = code < -half ? -half : code;
        codes[i] = (uint8_t)(int32_t)(code + half);
    }
    for (int i = 0; i < 16; i++) low[i] = (uint8_t)((codes[i] & 15) | codes[16 + i] << 4);
    for (int i = 0; i < GROUP; i++) top |= (uint64_t)(codes[i] >> 4) << (bits - 4) * i;
    if (bits > 4) memcpy(high, &top, (size_t)(4 * (bits - 4)));
}

/* The next bf16 that is not smaller, of what is not negative. */
INLINE float up_to_bf16(float value) { return float_of((bits_of(value) + 0xffff) & 0xffff0000u); }

/* A row as fp32, its last column repeated to fill a group. */
static void widen_row(const void *from, int type, int64_t row, int64_t columns, int64_t padded, float *x) {
    const uint16_t *half = (const uint16_t *)from + row * columns;
    if (type == BF16)
        for (int64_t i = 0; i < columns; i++) x[i] = from_bf16(half[i]);
    else if (type == F16)
        for (int64_t i = 0; i < columns; i++) x[i] = from_f16(half[i]);
    else
        memcpy(x, (const float *)from + row * columns, (size_t)columns * 4);
    for (int64_t i = columns; i < padded; i++) x[i] = x[columns - 1];
}

/* Least and greatest; 0 where one is not a finite number. */
INLINE int extremes(const float *x, int count, float *low, float *high) {
    float least = x[0], most = x[0], nothing = 0;
    for (int i = 0; i < count; i++) {
        least = x[i] < least ? x[i] : least;
        most = x[i] > most ? x[i] : most;
        nothing += x[i] - x[i]; /* 0, or not a number */
    }
    *low = least;
    *high = most;
    return nothing == 0;
}

/* A row of q8: see _blocks in fitting.py. */
static int encode_blocks(const float *x, int64_t blocks, uint8_t *row) {
    int finite = 1;
    for (int64_t block = 0; block < blocks; block++, x += BLOCK) {
        int8_t *codes = (int8_t *)row + 2 * blocks + BLOCK * block;
        float low, high, scale, factor;
        finite &= extremes(x, BLOCK, &low, &high);
        scale = up_to_bf16((fabsf(high) > fabsf(low) ? fabsf(high) : fabsf(low)) / 127);
        factor = scale > TINY ? 1 / scale : 0;
        for (int i = 0; i < BLOCK; i++) {
            float code = rintf(x[i] * factor);
            code = code > 127 ? 127 : code;
            codes[i] = (int8_t)(int32_t)(code < -127 ? -127 : code);
        }
        uint16_t unit = (uint16_t)(bits_of(scale) >> 16);
        memcpy(row + 2 * block, &unit, 2);
    }
    return finite;
}

/* What is known of the groups of a row while it is encoded, each an array. */
typedef struct {
    float *x, *middle, *factor, *half, *scale, *centre;
    int32_t *found;
} fit_t;

/* Scale and centre of each group: see _fit in fitting.py, also for why it is in double precision. */
static int fit_row(const fit_t *it, int64_t groups, int bits, const float *ranges, int tries) {
    int finite = 1;
    for (int64_t g = 0; g < groups; g++) {
        float low, high;
        finite &= extremes(it->x + GROUP * g, GROUP, &low, &high);
        it->middle[g] = low / 2 + high / 2;
        it->half[g] = high / 2 - low / 2;
        it->factor[g] = it->half[g] > TINY ? 1 / it->half[g] * REACH : 0;
    }
    memset(it->found, 0, (size_t)groups * 16);
    for (int64_t first = 0; first < groups; first += LANES)
        search_lanes(it->x, it->middle, it->factor, ranges, it->found, groups, first, tries, bits);
    for (int64_t g = 0; g < groups; g++) {
        int32_t number = it->found[g], all = it->found[groups + g], shared = it->found[2 * groups + g];
        int32_t spread = it->found[3 * groups + g];
        float slope = (float)shared / (float)(spread > 1 ? spread : 1), unit = it->half[g] / REACH;
        float offset = (float)(((double)all - (double)slope * number) / GROUP);
        it->scale[g] = slope * unit;
        it->centre[g] = (float)(it->middle[g] + (double)offset * unit);
    }
    return finite;
}

/* A row of q4, q5 or q6 from its scales and centres: see _groups in fitting.py. */
static void write_groups(const fit_t *it, int64_t groups, int bits, uint8_t *row) {
    uint8_t *scales = row + 4, *centres = scales + groups, *low = centres + groups, *high = low + 16 * groups;
    float most = 0, farthest = 0;
    for (int64_t g = 0; g < groups; g++) {
        most = it->scale[g] > most ? it->scale[g] : most;
        farthest = fabsf(it->centre[g]) > farthest ? fabsf(it->centre[g]) : farthest;
    }
    float d = up_to_bf16(most / 255), m = up_to_bf16(farthest / 127);
    uint16_t units[2] = {(uint16_t)(bits_of(d) >> 16), (uint16_t)(bits_of(m) >> 16)};
    memcpy(row, units, 4);
    for (int64_t g = 0; g < groups; g++, high += 4 * (bits - 4)) {
        float s = rintf(it->scale[g] / (d > 0 ? d : 1)), c = rintf(it->centre[g] / (m > 0 ? m : 1));
        s = s > 255 ? 255 : s;
        s = s < 1 && it->scale[g] > 0 ? 1 : s;
        c = c > 127 ? 127 : c < -127 ? -127 : c;
        scales[g] = (uint8_t)(int32_t)s;
        centres[g] = (uint8_t)(int32_t)c;
        pack_group(it->x + GROUP * g, d * s, m * c, bits, low + 16 * g, high);
    }
}

/* How many rows were not encoded: for want of memory, or because a value is not finite. */
int64_t lamina_affine_encode(const void *from, int64_t rows, int64_t columns, int32_t bits, int32_t type,
                             const float *ranges, int32_t tries, uint8_t *panels, int32_t threads) {
    int64_t bytes = affine_bytes(bits, columns), group = bits == 8 ? BLOCK : GROUP, failed = 0;
    int64_t groups = (columns + group - 1) / group, padded = groups * group;
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads) if (rows * columns > 65536) reduction(+ : failed)
    for (int64_t row = 0; row < rows; row++) {
        float *room = malloc((size_t)(padded + 9 * groups) * 4), *next = room + padded;
        uint8_t *to = panels + row * bytes;
        int finite = room != NULL;
        if (finite) {
            fit_t it = {room, next, next + groups, next + 2 * groups, next + 3 * groups, next + 4 * groups, NULL};
            it.found = (int32_t *)(next + 5 * groups);
            widen_row(from, type, row, columns, padded, room);
            finite = bits == 8 ? encode_blocks(room, groups, to) : fit_row(&it, groups, bits, ranges, tries);
            if (finite && bits < 8) write_groups(&it, groups, bits, to);
        }
        free(room);
        failed += !finite;
    }
    return failed;
}

/* ---- bf16z ----------------------------------------------------------------------------------------------------- */

#define CHUNK 4096  /* elements whose second codes are counted together */
#define RUN 256     /* elements whose first codes are interleaved */
#define SECONDS 128 /* second codes that are interleaved, in 48 bytes */
#define HEAD 16
#define FIRST 3  /* exponents with a code of two bits */
#define SECOND 7 /* and of three bits more */
#define ESCAPE 7

typedef struct {
    const uint8_t *counts, *raw, *firsts, *seconds, *escapes, *end;
    const uint8_t *first_table, *second_table;
} panel_t;

typedef struct {
    int64_t second, escape; /* how many come before this chunk's */
    int64_t seconds, escapes;
} place_t;

INLINE panel_t open_panel(const uint8_t *panel, int64_t panel_bytes, int64_t elements) {
    int64_t chunks = (elements + CHUNK - 1) / CHUNK, runs = (elements + RUN - 1) / RUN, seconds = 0;
    panel_t it;
    it.first_table = panel + 4;
    it.second_table = panel + 7;
    it.end = panel + panel_bytes;
    it.counts = panel + HEAD;
    it.raw = it.counts + 4 * chunks;
    it.firsts = it.raw + RUN * runs;
    it.seconds = it.firsts + RUN / 4 * runs;
    for (int64_t i = 0; i < chunks; i++) seconds += load16(it.counts + 4 * i);
    seconds = (seconds + SECONDS - 1) / SECONDS * 48;
    it.escapes = it.seconds + SMALLER(seconds, it.end - it.seconds);
    return it;
}

INLINE place_t find_chunk(const panel_t *it, int64_t chunk) {
    place_t place = {0, 0, load16(it->counts + 4 * chunk), load16(it->counts + 4 * chunk + 2)};
    for (int64_t i = 0; i < chunk; i++)
        place.second += load16(it->counts + 4 * i), place.escape += load16(it->counts + 4 * i + 2);
    return place;
}

/* One group of second codes: four to a byte of the first 32, the third bits in the other 16. */
INLINE void unpack_seconds(const uint8_t *restrict from, uint8_t *restrict codes) {
    for (int k = 0; k < 8; k++)
        for (int i = 0; i < 16; i++)
            codes[16 * k + i] =
                (uint8_t)((from[16 * (k % 2) + i] >> 2 * (k / 2) & 3) | (from[32 + i] >> k & 1) << 2);
}

/* Second codes of a chunk become exponents; gives how many escapes there are among them. */
#ifdef EXPANDING
INLINE int64_t translate(const panel_t *it, place_t place, uint8_t *codes) {
    uint8_t table[16] = {0};
    memcpy(table, it->second_table, ESCAPE);
    __m512i exponents = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)table));
    const uint8_t *next = it->escapes + place.escape;
    int64_t found = 0, left = it->end - next;
    for (int64_t i = 0; i < place.seconds; i += 64) {
        __m512i some = _mm512_loadu_si512(codes + i);
        uint64_t escaped = _mm512_cmpeq_epi8_mask(some, _mm512_set1_epi8(ESCAPE));
        if (place.seconds - i < 64) escaped &= (1ull << (place.seconds - i)) - 1;
        some = _mm512_shuffle_epi8(exponents, some);
        if (escaped) {
            uint64_t there = left - found >= 64 ? ~0ull : left > found ? (1ull << (left - found)) - 1 : 0;
            some = _mm512_mask_expand_epi8(some, escaped, _mm512_maskz_loadu_epi8(there, next + found));
            found += __builtin_popcountll(escaped);
        }
        _mm512_storeu_si512(codes + i, some);
    }
    return found;
}
#else
INLINE int64_t translate(const panel_t *it, place_t place, uint8_t *codes) {
    uint16_t at[CHUNK];
    int64_t found = 0, available = it->end - it->escapes - place.escape;
    const uint8_t *next = codes, *stop = codes + place.seconds;
    uint8_t table[8] = {0};
    while (next < stop && (next = memchr(next, ESCAPE, (size_t)(stop - next))))
        at[found++] = (uint16_t)(next++ - codes);
    memcpy(table, it->second_table, ESCAPE);
    for (int64_t i = 0; i < place.seconds; i++) codes[i] = table[codes[i] & 7];
    for (int64_t i = 0; i < found; i++) codes[at[i]] = i < available ? it->escapes[place.escape + i] : 0;
    return found;
}
#endif

/* 64 elements; gives how many second codes they took. */
#ifdef EXPANDING
#define UPPER(vector) _mm512_extracti64x4_epi64(vector, 1)
INLINE int expand(const uint8_t *raw, const uint8_t *firsts, int quarter, __m512i table, const uint8_t *seconds,
                  uint16_t *out) {
    __m512i low = _mm512_loadu_si512(raw), three = _mm512_set1_epi8(3);
    __m512i codes = _mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(firsts), 2 * quarter), three);
    __mmask64 others = _mm512_cmpeq_epi8_mask(codes, three);
    __m512i exponents = _mm512_shuffle_epi8(table, codes);
    exponents = _mm512_mask_expand_epi8(exponents, others, _mm512_loadu_si512(seconds));
    for (int half = 0; half < 2; half++) {
        __m512i e = _mm512_cvtepu8_epi16(half ? UPPER(exponents) : _mm512_castsi512_si256(exponents));
        __m512i r = _mm512_cvtepu8_epi16(half ? UPPER(low) : _mm512_castsi512_si256(low));
        __m512i sign = _mm512_and_si512(_mm512_slli_epi16(r, 8), _mm512_set1_epi16((short)0x8000));
        __m512i rest = _mm512_and_si512(r, _mm512_set1_epi16(0x7f));
        _mm512_storeu_si512(out + 32 * half, _mm512_or_si512(_mm512_or_si512(sign, rest), _mm512_slli_epi16(e, 7)));
    }
    return __builtin_popcountll(others);
}
#else
/* One bit for each byte that is 3. */
INLINE uint64_t find_threes(const uint8_t *codes) {
#if defined(__AVX2__)
    __m256i three = _mm256_set1_epi8(3);
    __m256i left = _mm256_cmpeq_epi8(_mm256_loadu_si256((const void *)codes), three);
    __m256i right = _mm256_cmpeq_epi8(_mm256_loadu_si256((const void *)(codes + 32)), three);
    return (uint32_t)_mm256_movemask_epi8(left) | (uint64_t)(uint32_t)_mm256_movemask_epi8(right) << 32;
#else
    uint64_t found = 0;
    for (int word = 0; word < 8; word++) {
        uint64_t eight;
        memcpy(&eight, codes + 8 * word, 8);
        /* Gathered into the highest byte. */
        found |= ((eight & eight >> 1 & 0x0101010101010101u) * 0x0102040810204080u) >> 56 << 8 * word;
    }
    return found;
#endif
}

INLINE int expand(const uint8_t *raw, const uint8_t *firsts, int quarter, const uint8_t *table, const uint8_t *seconds,
                  uint16_t *out) {
    uint8_t codes[64], exponents[64];
    uint8_t first = table[0], second = table[1], third = table[2];
    for (int i = 0; i < 64; i++) codes[i] = firsts[i] >> 2 * quarter & 3;
    for (int i = 0; i < 64; i++) exponents[i] = codes[i] == 0 ? first : codes[i] == 1 ? second : third;
    uint64_t others = find_threes(codes);
    int taken = __builtin_popcountll(others);
    for (; others; others &= others - 1) exponents[__builtin_ctzll(others)] = *seconds++;
    for (int i = 0; i < 64; i++)
        out[i] = (uint16_t)((raw[i] & 0x80) << 8 | (raw[i] & 0x7f) | exponents[i] << 7);
    return taken;
}
#endif

/* 0, or 1 where the panel's counts are not those of its codes. */
static int decode_chunk(const panel_t *it, int64_t chunk, int64_t elements, uint16_t *out) {
    uint8_t scratch[SECONDS + CHUNK + 2 * SECONDS];
    place_t place = find_chunk(it, chunk);
    int64_t group = place.second / SECONDS, behind = place.second % SECONDS, taken = 0;
    int64_t groups = (it->escapes - it->seconds) / 48;
    int wrong = place.seconds > CHUNK;
    place.seconds = SMALLER(place.seconds, CHUNK);
    memset(scratch, 0, sizeof scratch);
    for (int64_t at = 0; at < behind + place.seconds && group < groups; at += SECONDS, group++)
        unpack_seconds(it->seconds + 48 * group, scratch + at);
    wrong |= translate(it, place, scratch + behind) != place.escapes;
#ifdef EXPANDING
    uint32_t three = it->first_table[0] | it->first_table[1] << 8 | it->first_table[2] << 16;
    __m512i table = _mm512_set1_epi32((int)three);
#else
    const uint8_t *table = it->first_table;
#endif
    for (int64_t first = chunk * CHUNK; first < SMALLER(elements, (chunk + 1) * CHUNK); first += RUN) {
        uint16_t last[RUN];
        uint16_t *to = first + RUN <= elements ? out + first : last;
        for (int quarter = 0; quarter < 4; quarter++)
            taken += expand(it->raw + first + 64 * quarter, it->firsts + first / 4, quarter, table,
                            scratch + behind + taken, to + 64 * quarter);
        if (to == last) memcpy(out + first, last, (size_t)(elements - first) * 2);
    }
    return wrong | (taken != place.seconds);
}

/* How many chunks are damaged. */
int64_t lamina_bf16z_decode(const uint8_t *panels, int64_t count, int64_t panel_bytes, int64_t panel_elements,
                            int64_t elements, uint16_t *out, int32_t threads) {
    int64_t chunks = (panel_elements + CHUNK - 1) / CHUNK, wrong = 0;
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads) if (elements > 65536) reduction(+ : wrong)
    for (int64_t task = 0; task < count * chunks; task++) {
        int64_t panel = task / chunks, chunk = task % chunks, first = panel * panel_elements;
        int64_t own = SMALLER(panel_elements, elements - first);
        if (chunk * CHUNK >= own) continue;
        panel_t it = open_panel(panels + panel * panel_bytes, panel_bytes, own);
        wrong += decode_chunk(&it, chunk, own, out + first);
    }
    return wrong;
}

#include "gguf_kernels.c"

/* How often each exponent occurs: counts[256]. */
static void count_exponents(const uint16_t *bits, int64_t elements, int64_t *counts) {
    uint32_t apart[4][256]; /* a counter that is still being written would be waited for */
    memset(counts, 0, 256 * sizeof *counts);
    for (int64_t at = 0; at < elements; at += 1 << 30) {
        int64_t end = SMALLER(elements, at + (1 << 30)), i = at;
        memset(apart, 0, sizeof apart);
        for (; i + 4 <= end; i += 4)
            for (int k = 0; k < 4; k++) apart[k][bits[i + k] >> 7 & 255]++;
        for (; i < end; i++) apart[0][bits[i] >> 7 & 255]++;
        for (int e = 0; e < 256; e++) counts[e] += (int64_t)apart[0][e] + apart[1][e] + apart[2][e] + apart[3][e];
    }
}

/* The commonest first, of equals the smaller first; and the bytes that such a panel takes. */
static int64_t rank_exponents(const int64_t *counts, int64_t elements, uint8_t ranked[FIRST + SECOND]) {
    int64_t seconds = elements, escapes, fixed;
    uint8_t taken[256] = {0};
    for (int rank = 0; rank < FIRST + SECOND; rank++) {
        int best = -1;
        for (int e = 0; e < 256; e++)
            if (!taken[e] && (best < 0 || counts[e] > counts[best])) best = e;
        taken[best] = 1;
        ranked[rank] = (uint8_t)best;
    }
    for (int rank = 0; rank < FIRST; rank++) seconds -= counts[ranked[rank]];
    escapes = seconds;
    for (int rank = FIRST; rank < FIRST + SECOND; rank++) escapes -= counts[ranked[rank]];
    fixed = HEAD + 4 * ((elements + CHUNK - 1) / CHUNK) + (RUN + RUN / 4) * ((elements + RUN - 1) / RUN);
    return fixed + 48 * ((seconds + SECONDS - 1) / SECONDS) + escapes;
}

static void pack_firsts(const uint8_t *codes, uint8_t *to) {
    for (int i = 0; i < 64; i++)
        to[i] = (uint8_t)(codes[i] | codes[64 + i] << 2 | codes[128 + i] << 4 | codes[192 + i] << 6);
}

static void pack_seconds(const uint8_t *codes, uint8_t *to) {
    memset(to, 0, 48);
    for (int k = 0; k < 4; k++)
        for (int i = 0; i < 32; i++) to[i] |= (uint8_t)((codes[32 * k + i] & 3) << 2 * k);
    for (int k = 0; k < 8; k++)
        for (int i = 0; i < 16; i++) to[32 + i] |= (uint8_t)(codes[16 * k + i] >> 2 << k);
}

/* Raw bytes and first codes of one run; gives how many of its exponents have none and are written to `others`. */
static int encode_run(const uint16_t *bits, int count, const uint8_t *firsts, uint8_t *raw, uint8_t *to,
                      uint8_t *others) {
    uint8_t codes[RUN] = {0};
    int found = 0;
    for (int i = 0; i < count; i++) raw[i] = (uint8_t)((bits[i] >> 8 & 0x80) | (bits[i] & 0x7f));
    for (int i = 0; i < count; i++) { /* without a branch: nobody can foresee which exponent is next */
        uint8_t exponent = bits[i] >> 7 & 255;
        codes[i] = firsts[exponent];
        others[found] = exponent;
        found += codes[i] == FIRST;
    }
    pack_firsts(codes, to);
    return found;
}

/* What follows the head; the panel is all zeros there before. */
static void encode_panel(const uint16_t *bits, int64_t elements, int64_t second_count, uint8_t *panel) {
    uint8_t firsts[256], seconds[256], waiting[SECONDS + CHUNK + 1], *counts = panel + HEAD;
    uint8_t *raw = counts + 4 * ((elements + CHUNK - 1) / CHUNK), *codes = raw + (elements + RUN - 1) / RUN * RUN;
    uint8_t *groups = codes + (elements + RUN - 1) / RUN * (RUN / 4);
    uint8_t *escapes = groups + 48 * ((second_count + SECONDS - 1) / SECONDS);
    int behind = 0, done; /* second codes of chunks before that wait for their group to be full */
    memset(firsts, FIRST, sizeof firsts);
    memset(seconds, ESCAPE, sizeof seconds);
    for (int rank = 0; rank < FIRST; rank++) firsts[panel[4 + rank]] = (uint8_t)rank;
    for (int rank = 0; rank < SECOND; rank++) seconds[panel[4 + FIRST + rank]] = (uint8_t)rank;
    for (int64_t chunk = 0; chunk * CHUNK < elements; chunk++, counts += 4) {
        uint16_t found[2] = {0, 0};
        for (int64_t at = chunk * CHUNK; at < SMALLER(elements, (chunk + 1) * CHUNK); at += RUN)
            found[0] += (uint16_t)encode_run(bits + at, (int)SMALLER(elements - at, RUN), firsts, raw + at,
                                             codes + at / 4, waiting + behind + found[0]);
        for (int i = behind; i < behind + found[0]; i++) {
            uint8_t exponent = waiting[i];
            waiting[i] = seconds[exponent];
            if (waiting[i] == ESCAPE) found[1]++, *escapes++ = exponent;
        }
        memcpy(counts, found, 4);
        behind += found[0];
        for (done = 0; done + SECONDS <= behind; done += SECONDS, groups += 48) pack_seconds(waiting + done, groups);
        memmove(waiting, waiting + done, (size_t)(behind -= done));
    }
    memset(waiting + behind, 0, SECONDS);
    if (behind) pack_seconds(waiting, groups);
}

/* The most bytes that one of the panels needs; where `out` is given and that is not more than `panel_bytes`, the
   panels are written there. */
int64_t lamina_bf16z_encode(const uint16_t *bits, int64_t elements, int64_t panel_elements, uint32_t panel_rows,
                            int64_t panel_bytes, uint8_t *out, int32_t threads) {
    int64_t panels = (elements + panel_elements - 1) / panel_elements, most = 0;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (elements > 65536) reduction(max : most)
    for (int64_t index = 0; index < panels; index++) {
        const uint16_t *from = bits + index * panel_elements;
        int64_t own = SMALLER(panel_elements, elements - index * panel_elements), counts[256], seconds = own, need;
        uint8_t ranked[FIRST + SECOND], *panel = out + index * panel_bytes;
        count_exponents(from, own, counts);
        need = rank_exponents(counts, own, ranked);
        most = need > most ? need : most;
        if (!out || need > panel_bytes) continue;
        for (int rank = 0; rank < FIRST; rank++) seconds -= counts[ranked[rank]];
        memset(panel, 0, (size_t)panel_bytes);
        memcpy(panel, &panel_rows, 4);
        memcpy(panel + 4, ranked, sizeof ranked);
        encode_panel(from, own, seconds, panel);
    }
    return most;
}

int32_t lamina_kernels_version(void) { return 1; }
