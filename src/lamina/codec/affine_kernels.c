/* q4, q5, q6 and q8, and products of what is decoded span by span. A part of kernels.c; the format is in affine.py. */

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
