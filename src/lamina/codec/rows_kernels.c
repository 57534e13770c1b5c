/* Products of some rows with weights as they lie: y[t][r] = sum over c of x[t][c] * w[r][c], plus a bias.

   Every element of y is summed in the same order, whatever else is in the call: sixteen sums side by side, in fp32, the
   c-th product goes to lane (c / 2) % 16 of them (of fp32 and fp16 weights c % 16), and the lanes are added in halves at
   the end. So the bits of a row depend neither on the other rows nor on how rows of weights are divided. Pairs of bf16
   are added second one first, as AVX-512's vdpbf16ps does it, which takes numbers below 2^-126 for zero; so do the others
   not, which is the one difference between processors. */

#if defined(__AVX512F__) /* thirty-two registers hold sixteen sums of sixteen */
enum { AT_A_TIME = 4, WEIGHT_ROWS = 4, SHARE_ROWS = 32 };
#else
enum { AT_A_TIME = 2, WEIGHT_ROWS = 2, SHARE_ROWS = 32 };
#endif

/* Sixteen numbers side by side, which compilers divide into the vectors of the machine. */
typedef float lanes_t __attribute__((vector_size(64)));
typedef uint32_t bits_t __attribute__((vector_size(64)));

INLINE float halves(lanes_t sums) {
    float lanes[16];
    memcpy(lanes, &sums, sizeof lanes);
    for (int size = 8; size; size /= 2)
        for (int i = 0; i < size; i++) lanes[i] += lanes[i + size];
    return lanes[0];
}

/* For each type: what is loaded at once, all of it or the first `count` numbers with zeros after them, and how two of
   them are multiplied into the sums. */
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
typedef __m512bh bf16_t;
INLINE bf16_t bf16_all(const uint16_t *from) { return (__m512bh)_mm512_loadu_si512((const void *)from); }
INLINE bf16_t bf16_some(const uint16_t *from, int count) {
    return (__m512bh)_mm512_maskz_loadu_epi16((__mmask32)(0xffffffffu >> (32 - count)), from);
}
INLINE lanes_t bf16_add(lanes_t sums, bf16_t a, bf16_t b) { return (lanes_t)_mm512_dpbf16_ps((__m512)sums, a, b); }
#else
typedef bits_t bf16_t;
INLINE bf16_t bf16_some(const uint16_t *from, int count) {
    bf16_t out = {0};
    memcpy(&out, from, (size_t)count * 2);
    return out;
}
INLINE bf16_t bf16_all(const uint16_t *from) {
    bf16_t out;
    memcpy(&out, from, sizeof out);
    return out;
}
INLINE lanes_t bf16_add(lanes_t sums, bf16_t a, bf16_t b) {
    sums += (lanes_t)(a & 0xffff0000u) * (lanes_t)(b & 0xffff0000u);
    return sums + (lanes_t)(a << 16) * (lanes_t)(b << 16);
}
#endif
enum { bf16_step = 32, f16_step = 16, f32_step = 16 };

typedef lanes_t f32_t;
INLINE f32_t f32_some(const float *from, int count) {
    f32_t out = {0};
    memcpy(&out, from, (size_t)count * 4);
    return out;
}
INLINE f32_t f32_all(const float *from) {
    f32_t out;
    memcpy(&out, from, sizeof out);
    return out;
}
INLINE lanes_t f32_add(lanes_t sums, f32_t a, f32_t b) { return sums + a * b; }

typedef lanes_t f16_t;
INLINE f16_t f16_all(const uint16_t *from) {
#if defined(__AVX512F__)
    return (f16_t)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#else
    float out[16];
    for (int i = 0; i < 16; i++) out[i] = from_f16(from[i]);
    return f32_all(out);
#endif
}
INLINE f16_t f16_some(const uint16_t *from, int count) {
    uint16_t half[16] = {0};
    memcpy(half, from, (size_t)count * 2);
    return f16_all(half);
}
INLINE lanes_t f16_add(lanes_t sums, f16_t a, f16_t b) { return sums + a * b; }

/* T rows of x with R rows of weights, in both `columns` apart. */
#define TILE(KIND, TYPE, T, R)                                                                                         \
    static void KIND##_##T##_##R(const TYPE *x, const TYPE *w, int64_t columns, float (*y)[WEIGHT_ROWS]) {             \
        lanes_t sums[T][R];                                                                                            \
        for (int t = 0; t < T; t++)                                                                                    \
            for (int r = 0; r < R; r++) sums[t][r] = (lanes_t){0};                                                     \
        int64_t c = 0;                                                                                                 \
        for (; c + KIND##_step <= columns; c += KIND##_step) {                                                         \
            KIND##_t weight[R];                                                                                        \
            for (int r = 0; r < R; r++) weight[r] = KIND##_all(w + r * columns + c);                                   \
            for (int t = 0; t < T; t++) {                                                                              \
                KIND##_t row = KIND##_all(x + t * columns + c);                                                        \
                for (int r = 0; r < R; r++) sums[t][r] = KIND##_add(sums[t][r], row, weight[r]);                       \
            }                                                                                                          \
        }                                                                                                              \
        int left = (int)(columns - c);                                                                                 \
        for (int t = 0; left && t < T; t++) {                                                                          \
            KIND##_t row = KIND##_some(x + t * columns + c, left);                                                     \
            for (int r = 0; r < R; r++) sums[t][r] = KIND##_add(sums[t][r], row, KIND##_some(w + r * columns + c, left)); \
        }                                                                                                              \
        for (int t = 0; t < T; t++)                                                                                    \
            for (int r = 0; r < R; r++) y[t][r] = halves(sums[t][r]);                                                  \
    }

typedef void (*tile_t)(const void *, const void *, int64_t, float (*)[WEIGHT_ROWS]);

#if defined(__AVX512F__)
#define TILES(KIND, TYPE)                                                                                              \
    TILE(KIND, TYPE, 1, 1) TILE(KIND, TYPE, 2, 1) TILE(KIND, TYPE, 3, 1) TILE(KIND, TYPE, 4, 1)                        \
    TILE(KIND, TYPE, 1, 4) TILE(KIND, TYPE, 2, 4) TILE(KIND, TYPE, 3, 4) TILE(KIND, TYPE, 4, 4)
#define NAMES(KIND)                                                                                                    \
    {{(tile_t)KIND##_1_1, (tile_t)KIND##_2_1, (tile_t)KIND##_3_1, (tile_t)KIND##_4_1},                                 \
     {(tile_t)KIND##_1_4, (tile_t)KIND##_2_4, (tile_t)KIND##_3_4, (tile_t)KIND##_4_4}}
#else
#define TILES(KIND, TYPE)                                                                                              \
    TILE(KIND, TYPE, 1, 1) TILE(KIND, TYPE, 2, 1) TILE(KIND, TYPE, 1, 2) TILE(KIND, TYPE, 2, 2)
#define NAMES(KIND) {{(tile_t)KIND##_1_1, (tile_t)KIND##_2_1}, {(tile_t)KIND##_1_2, (tile_t)KIND##_2_2}}
#endif
TILES(bf16, uint16_t)
TILES(f16, uint16_t)
TILES(f32, float)
static const tile_t TILE_OF[3][2][AT_A_TIME] = {NAMES(bf16), NAMES(f16), NAMES(f32)};

/* Rows of weights from `first` on; the bias may be missing, and is of the type of the others. */
static void rows_product(const uint8_t *x, int64_t tokens, const uint8_t *w, int64_t first, int64_t last,
                         int64_t columns, const uint8_t *bias, int type, void *out, int64_t stride) {
    int64_t size = type == F32 ? 4 : 2;
    for (int64_t r = first; r < last;) {
        int rows = last - r >= WEIGHT_ROWS ? WEIGHT_ROWS : 1;
        for (int64_t t = 0; t < tokens; t += AT_A_TIME) {
            int number = (int)SMALLER(tokens - t, AT_A_TIME);
            float y[AT_A_TIME][WEIGHT_ROWS];
            TILE_OF[type][rows > 1][number - 1](x + t * columns * size, w + r * columns * size, columns, y);
            for (int i = 0; i < number; i++) {
                if (bias)
                    for (int k = 0; k < rows; k++)
                        y[i][k] += type == F32    ? ((const float *)bias)[r + k]
                                   : type == BF16 ? from_bf16(((const uint16_t *)bias)[r + k])
                                                  : from_f16(((const uint16_t *)bias)[r + k]);
                put(y[i], rows, type, out, (t + i) * stride + r);
            }
        }
        r += rows;
    }
}

/* Whether products of a type are made with instructions for them. */
int32_t lamina_rows_quick(int32_t type) {
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
    return type >= BF16 && type <= F32;
#elif defined(__AVX512F__)
    return type == F16 || type == F32;
#else
    return 0 * type;
#endif
}

void lamina_rows_linear(const uint8_t *x, int64_t tokens, const uint8_t *w, int64_t rows, int64_t columns,
                        const uint8_t *bias, int32_t type, void *out, int64_t stride, int32_t threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (rows * columns > 65536)
    for (int64_t first = 0; first < rows; first += SHARE_ROWS)
        rows_product(x, tokens, w, first, SMALLER(rows, first + SHARE_ROWS), columns, bias, type, out, stride);
}
