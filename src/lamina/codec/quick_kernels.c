/* Quick products of q4, q5, q6 and q8 for drafts, at the speed of memory. A part of kernels.c.

   The activations become signed bytes, a scale for each group of 32 columns, once a call; the codes of the weights
   stay packed until they are in a register, and are multiplied as the unsigned bytes that they are:

       sum of (d s (code - o) + m c) x   =   d s a (sum of code q  -  o sum of q)  +  m c (sum of x)     with x = a q

   for each group; o is 2^(bits - 1). The sum of a group's products is an exact integer, the sum over groups is fp32.
   So all that is inexact is x rounded to 1/127 of the largest of its group, half that at most. As everywhere here, a
   sum depends neither on the other tokens nor on the other rows of the call. */

#define STRETCH 512 /* columns that are computed at a time: sixteen groups, a lane of a vector for each */
#define STRETCH_GROUPS (STRETCH / GROUP)
#define QUICK_TOKENS 16
#define QUICK_TILE 4 /* tokens at a time */
#define FIRST_CACHE (24 << 10) /* bytes of x that stay in it: beyond, fewer tokens at a time are quicker */

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define QUICK_512 1
#endif

/* Without integer dot products decoding to fp32 is quicker. Tests define it, to see the portable way at all. */
#if !defined(QUICKER)
#if defined(__AVX2__) || defined(__ARM_FEATURE_DOTPROD)
#define QUICKER 1
#else
#define QUICKER 0
#endif
#endif

/* A stretch of one token. Codes lie as the weights' do: of four groups the first halves, then the second halves; for
   q8 in the order of columns. Columns that there are not are zeros. */
typedef struct {
    int8_t codes[STRETCH];
    float scales[STRETCH_GROUPS];  /* a */
    float offsets[STRETCH_GROUPS]; /* - o a (sum of q) */
    float sums[STRETCH_GROUPS];    /* of x itself */
} ALIGNED stretch_t;

/* Where the parts of a row begin. */
typedef struct {
    const uint8_t *scales, *centres, *codes, *high;
} parts_t;

INLINE parts_t parts_of(int bits, const uint8_t *row, int64_t columns) {
    int64_t groups = (columns + GROUP - 1) / GROUP, blocks = (columns + BLOCK - 1) / BLOCK;
    if (bits == 8) return (parts_t){row, row, row + 2 * blocks, row};
    return (parts_t){row + 4, row + 4 + groups, row + 4 + 2 * groups, row + 4 + 18 * groups};
}

INLINE void quantise_group(const float *x, int offset, stretch_t *to, int group, int8_t *low, int8_t *high) {
    uint32_t largest = 0;
    float sums[LANES];
    for (int i = 0; i < GROUP; i++) {
        uint32_t size = bits_of(x[i]) & 0x7fffffff; /* in the order of the numbers, NaN above all */
        largest = size > largest ? size : largest;
    }
    for (int i = 0; i < LANES; i++) sums[i] = x[i] + x[LANES + i];
    float size = float_of(largest), inverse = size > 1e-30f ? 127 / size : 0;
    int32_t sum = 0;
    int8_t codes[GROUP];
    for (int i = 0; i < GROUP; i++) codes[i] = (int8_t)bits_of(x[i] * inverse + 12582912.0f); /* 3 * 2^22: rounds */
    for (int i = 0; i < GROUP; i++) sum += codes[i];
    memcpy(low, codes, 16);
    memcpy(high, codes + 16, 16);
    to->scales[group] = largest > 0x7f7fffff ? float_of(0x7fc00000) : inverse > 0 ? size / 127 : 0;
    to->offsets[group] = -to->scales[group] * (float)(offset * sum);
    to->sums[group] = total(sums);
}

/* x as [tokens][stretches]. */
static void quantise(const void *x, int type, int64_t tokens, int64_t columns, int bits, int offset, stretch_t *to) {
    float values[STRETCH] ALIGNED;
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t first = 0; first < columns; first += STRETCH, to++) {
            int64_t count = SMALLER(columns - first, STRETCH);
            const uint16_t *half = (const uint16_t *)x + t * columns + first;
            if (type == BF16)
                for (int64_t i = 0; i < count; i++) values[i] = from_bf16(half[i]);
            else if (type == F16)
                for (int64_t i = 0; i < count; i++) values[i] = from_f16(half[i]);
            else
                memcpy(values, (const float *)x + t * columns + first, (size_t)count * 4);
            memset(values + count, 0, (size_t)(STRETCH - count) * 4);
            for (int group = 0; group < STRETCH_GROUPS; group++) {
                int8_t *at = to->codes + (bits == 8 ? GROUP * group : group / 4 * 128 + group % 4 * 16);
                quantise_group(values + GROUP * group, offset, to, group, at, at + (bits == 8 ? 16 : 64));
            }
        }
}

#if defined(QUICK_512)

#define OFFSET_OF_8 128 /* signed codes become unsigned */
typedef __m512 sum_t;
#define NO_SUM _mm512_setzero_ps()

typedef struct {
    __m512i codes[8]; /* as stretch_t's */
    __m512 scales, centres;
} weights_t;

INLINE __mmask64 first_bytes(int64_t count) {
    return count <= 0 ? 0 : count >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << count) - 1;
}

/* Lane i is 4 part + i / 4: the group that the lane's sum of products belongs to. */
INLINE __m512i four_of_each(int part) {
    const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_add_epi32(lanes, _mm512_set1_epi32(4 * part));
}

INLINE __m512i eight_of_each(int part) {
    const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    return _mm512_add_epi32(lanes, _mm512_set1_epi32(2 * part));
}

/* Each byte is bits [from, from + 8) of its eight bytes, `from` growing by `step` from byte to byte. */
INLINE __m512i bits_from(int from, int step) {
    int8_t at[64];
    for (int i = 0; i < 64; i++) at[i] = (int8_t)((from + i % 16 * step) & 63);
    return _mm512_loadu_si512(at);
}

/* Sixteen groups, from `group` on; nothing after the first `left` of them is read, and is zero. */
INLINE weights_t load_groups(int bits, parts_t row, int64_t group, int64_t left) {
    weights_t to;
    __mmask16 some = (__mmask16)first_bytes(left);
    const __m512i low = _mm512_set1_epi8(15);
    __m512i high[2];
    if (bits == 5) high[0] = _mm512_maskz_loadu_epi32(some, row.high + 4 * group);
    if (bits == 6) {
        high[0] = _mm512_maskz_loadu_epi64((__mmask8)some, row.high + 8 * group);
        high[1] = _mm512_maskz_loadu_epi64((__mmask8)(some >> 8), row.high + 8 * group + 64);
    }
#pragma GCC unroll 4
    for (int part = 0; part < 4; part++) {
        __mmask64 held = first_bytes(16 * (left - 4 * part));
        __m512i both = _mm512_maskz_loadu_epi8(held, row.codes + 16 * group + 64 * part);
        __m512i a = _mm512_and_si512(both, low), b = _mm512_and_si512(_mm512_srli_epi16(both, 4), low), more;
        if (bits == 5) {
            more = _mm512_permutexvar_epi32(four_of_each(part), high[0]);
            const __m512i bit = _mm512_set1_epi8(16); /* 0xf8: a | b & c */
            a = _mm512_ternarylogic_epi32(a, _mm512_multishift_epi64_epi8(bits_from(60, 1), more), bit, 0xf8);
            b = _mm512_ternarylogic_epi32(b, _mm512_multishift_epi64_epi8(bits_from(12, 1), more), bit, 0xf8);
        }
        if (bits == 6) {
            const __m512i pairs = _mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3), bit = _mm512_set1_epi8(48);
            more = _mm512_permutexvar_epi64(_mm512_add_epi64(pairs, _mm512_set1_epi64(part % 2 * 4)), high[part / 2]);
            a = _mm512_ternarylogic_epi32(a, _mm512_multishift_epi64_epi8(bits_from(60, 2), more), bit, 0xf8);
            b = _mm512_ternarylogic_epi32(b, _mm512_multishift_epi64_epi8(bits_from(28, 2), more), bit, 0xf8);
        }
        to.codes[2 * part] = a, to.codes[2 * part + 1] = b;
    }
    to.scales = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, row.scales + group)));
    to.centres = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(some, row.centres + group)));
    return to;
}

/* The same of q8: eight blocks. */
INLINE weights_t load_blocks(parts_t row, int64_t block, int64_t left) {
    weights_t to;
    __m128i scales = _mm_maskz_loadu_epi16((__mmask8)first_bytes(left), row.scales + 2 * block);
    const __m512i pairs = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    __m512i words = _mm512_castsi256_si512(_mm256_slli_epi32(_mm256_cvtepu16_epi32(scales), 16));
    to.scales = _mm512_castsi512_ps(_mm512_permutexvar_epi32(pairs, words));
    to.centres = _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        __m512i codes = _mm512_maskz_loadu_epi8(i < left ? ~(__mmask64)0 : 0, row.codes + BLOCK * (block + i));
        to.codes[i] = _mm512_xor_si512(codes, _mm512_set1_epi8((char)OFFSET_OF_8));
    }
    return to;
}

INLINE weights_t load_weights(int bits, parts_t row, int64_t columns, int64_t first) {
    int64_t left = SMALLER(columns - first, STRETCH);
    if (bits == 8) return load_blocks(row, first / BLOCK, (left + BLOCK - 1) / BLOCK);
    return load_groups(bits, row, first / GROUP, (left + GROUP - 1) / GROUP);
}

/* Adds to a sum in units of d and to one in units of m. Two short chains of additions, not a long one. */
INLINE void add_products(int bits, const weights_t *w, const stretch_t *x, sum_t *scaled, sum_t *centred) {
    __m512 scales = _mm512_mul_ps(w->scales, _mm512_load_ps(x->scales));
    __m512 sum = _mm512_mul_ps(w->scales, _mm512_load_ps(x->offsets)), other = *scaled;
    if (bits < 8) *centred = _mm512_fmadd_ps(w->centres, _mm512_load_ps(x->sums), *centred);
    const int parts = bits == 8 ? 8 : 4;
#pragma GCC unroll 8
    for (int part = 0; part < parts; part++) {
        __m512i products = _mm512_setzero_si512(), lanes = bits == 8 ? eight_of_each(part) : four_of_each(part);
        if (bits == 8) {
            products = _mm512_dpbusd_epi32(products, w->codes[part], _mm512_load_si512(x->codes + 64 * part));
        } else {
            const int8_t *codes = x->codes + 128 * part;
            products = _mm512_dpbusd_epi32(products, w->codes[2 * part], _mm512_load_si512(codes));
            products = _mm512_dpbusd_epi32(products, w->codes[2 * part + 1], _mm512_load_si512(codes + 64));
        }
        __m512 each = _mm512_permutexvar_ps(lanes, scales);
        sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), each, sum);
    }
    *scaled = _mm512_add_ps(sum, other);
}

INLINE float total_of(int bits, const uint8_t *row, sum_t scaled, sum_t centred) {
    if (bits == 8) return _mm512_reduce_add_ps(scaled);
    __m512 unit = _mm512_set1_ps(from_bf16(load16(row))), centre = _mm512_set1_ps(from_bf16(load16(row + 2)));
    return _mm512_reduce_add_ps(_mm512_fmadd_ps(scaled, unit, _mm512_mul_ps(centred, centre)));
}

#else

#define OFFSET_OF_8 0
typedef struct {
    floats_t lanes[LANES / WIDTH];
} sum_t;
#define NO_SUM ((sum_t){0})

typedef struct {
    int8_t codes[STRETCH]; /* as stretch_t's */
    float scales[STRETCH_GROUPS], centres[STRETCH_GROUPS];
} ALIGNED weights_t;

#if defined(__AVX2__)
/* The 32 codes of a group, in their order. */
INLINE __m256i codes_of(int bits, const uint8_t *codes, const uint8_t *high) {
    __m128i both = _mm_loadu_si128((const void *)codes);
    __m256i low = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(both, 4), both), _mm256_set1_epi8(15));
    if (bits == 5) {
        const __m256i byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
        const __m256i bit = _mm256_set1_epi64x((int64_t)0x8040201008040201);
        __m256i all = _mm256_shuffle_epi8(_mm256_set1_epi32((int32_t)load32(high)), byte);
        __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(all, bit), bit);
        return _mm256_or_si256(low, _mm256_and_si256(set, _mm256_set1_epi8(16)));
    }
    if (bits == 6) { /* a byte holds four columns: those of even bytes are shifted apart from those of odd ones */
        const __m256i byte = _mm256_setr_epi64x(0x0101010100000000, 0x0303030302020202, 0x0505050504040404,
                                                0x0707070706060606);
        __m256i four = _mm256_set_m128i(_mm_loadl_epi64((const void *)high), _mm_loadl_epi64((const void *)high));
        four = _mm256_shuffle_epi8(four, byte);
        __m256i even = _mm256_and_si256(four, _mm256_set1_epi16(255));
        even = _mm256_mullo_epi16(even, _mm256_set1_epi32(1 << 16 | 16));
        __m256i odd = _mm256_mullo_epi16(_mm256_srli_epi16(four, 8), _mm256_set1_epi32(64 << 16 | 1024));
        even = _mm256_and_si256(even, _mm256_set1_epi16(0x30)), odd = _mm256_and_si256(odd, _mm256_set1_epi16(0x3000));
        return _mm256_or_si256(low, _mm256_or_si256(even, odd));
    }
    return low;
}

/* Two groups at a time: what is written in one piece is read in one piece, else the processor waits. */
INLINE void unpack(int bits, parts_t row, int64_t group, int64_t left, int8_t *to) {
    int step = 4 * (bits - 4);
    for (int64_t i = 0; i < left; i += 2, group += 2) {
        int8_t *low = to + i / 4 * 128 + i % 4 * 16;
        __m256i a = codes_of(bits, row.codes + 16 * group, row.high + step * group), b = _mm256_setzero_si256();
        if (i + 1 < left) b = codes_of(bits, row.codes + 16 * (group + 1), row.high + step * (group + 1));
        _mm256_storeu_si256((void *)low, _mm256_permute2x128_si256(a, b, 0x20));
        _mm256_storeu_si256((void *)(low + 64), _mm256_permute2x128_si256(a, b, 0x31));
    }
}
#else
INLINE void unpack(int bits, parts_t row, int64_t group, int64_t left, int8_t *to) {
    for (int64_t i = 0; i < left; i++, group++) {
        const uint8_t *codes = row.codes + 16 * group;
        uint8_t more[GROUP] = {0};
        int8_t *low = to + i / 4 * 128 + i % 4 * 16, *high = low + 64;
        for (int k = 0; bits == 5 && k < GROUP; k++) more[k] = row.high[4 * group + k / 8] >> k % 8 << 4 & 16;
        for (int k = 0; bits == 6 && k < GROUP; k++) more[k] = row.high[8 * group + k / 4] >> 2 * (k % 4) << 4 & 48;
        for (int k = 0; k < 16; k++) low[k] = (int8_t)((codes[k] & 15) | more[k]);
        for (int k = 0; k < 16; k++) high[k] = (int8_t)(codes[k] >> 4 | more[16 + k]);
    }
}
#endif

INLINE weights_t load_weights(int bits, parts_t row, int64_t columns, int64_t first) {
    weights_t to;
    int64_t group = first / GROUP, left = SMALLER((columns - first + GROUP - 1) / GROUP, STRETCH_GROUPS);
    if (left < STRETCH_GROUPS) memset(&to, 0, sizeof to);
    if (bits == 8) {
        for (int64_t i = 0; i < left; i++) to.scales[i] = from_bf16(load16(row.scales + (group + i) / 2 * 2));
        memcpy(to.codes, row.codes + GROUP * group, (size_t)(left + left % 2) * GROUP);
        return to;
    }
    unpack(bits, row, group, left, to.codes);
    for (int64_t i = 0; i < left; i++) to.scales[i] = row.scales[group + i];
    for (int64_t i = 0; i < left; i++) to.centres[i] = (int8_t)row.centres[group + i];
    return to;
}

INLINE void scale_sums(const float *by, const float *values, sum_t *sum) {
    for (int i = 0; i < LANES / WIDTH; i++) {
        floats_t a, b;
        memcpy(&a, by + i * WIDTH, sizeof a), memcpy(&b, values + i * WIDTH, sizeof b);
        sum->lanes[i] += a * b;
    }
}

#if defined(__AVX2__)
/* Sums of four products each. Pairs of products fit sixteen bits: two of (63 + 63) x 127, or of 128 x 127. */
INLINE __m256i add_dot(int bits, __m256i sum, const int8_t *weights, const int8_t *x) {
    __m256i w = _mm256_loadu_si256((const void *)weights), q = _mm256_loadu_si256((const void *)x);
    if (bits == 8) { /* |w| times x of w's sign */
        q = _mm256_sign_epi8(q, w);
        w = _mm256_abs_epi8(w);
    }
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sum, w, q);
#else
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, q), _mm256_set1_epi16(1)));
#endif
}

/* Two groups at a time: four lanes for each. */
INLINE void add_products(int bits, const weights_t *w, const stretch_t *x, sum_t *scaled, sum_t *centred) {
    float scales[STRETCH_GROUPS];
    for (int i = 0; i < STRETCH_GROUPS; i++) scales[i] = w->scales[i] * x->scales[i];
    scale_sums(w->scales, x->offsets, scaled);
    if (bits < 8) scale_sums(w->centres, x->sums, centred);
#pragma GCC unroll 8
    for (int pair = 0; pair < STRETCH_GROUPS / 2; pair++) {
        __m256i products = _mm256_setzero_si256();
        int at = bits == 8 ? 64 * pair : pair / 2 * 128 + pair % 2 * 32;
        if (bits == 8) { /* lanes of the second group go beside those of the first */
            __m256i a = add_dot(bits, products, w->codes + at, x->codes + at);
            __m256i b = add_dot(bits, products, w->codes + at + 32, x->codes + at + 32);
            products = _mm256_permute4x64_epi64(_mm256_hadd_epi32(a, b), 0xd8);
        } else {
            products = add_dot(bits, products, w->codes + at, x->codes + at);
            products = add_dot(bits, products, w->codes + at + 64, x->codes + at + 64);
        }
        __m256 both = _mm256_set_m128(_mm_set1_ps(scales[2 * pair + 1]), _mm_set1_ps(scales[2 * pair]));
        floats_t values = (floats_t)_mm256_cvtepi32_ps(products) * (floats_t)both;
        scaled->lanes[pair % 2] += values;
    }
}
#else
INLINE void add_products(int bits, const weights_t *w, const stretch_t *x, sum_t *scaled, sum_t *centred) {
    float products[STRETCH_GROUPS];
    for (int group = 0; group < STRETCH_GROUPS; group++) {
        int at = bits == 8 ? GROUP * group : group / 4 * 128 + group % 4 * 16, half = bits == 8 ? 16 : 64;
        int32_t sum = 0;
        for (int i = 0; i < 16; i++) sum += w->codes[at + i] * x->codes[at + i];
        for (int i = at + half; i < at + half + 16; i++) sum += w->codes[i] * x->codes[i];
        products[group] = (float)sum * x->scales[group];
    }
    scale_sums(w->scales, x->offsets, scaled);
    scale_sums(w->scales, products, scaled);
    if (bits < 8) scale_sums(w->centres, x->sums, centred);
}
#endif

INLINE float total_of(int bits, const uint8_t *row, sum_t scaled, sum_t centred) {
    float sum = total((const float *)&scaled);
    return bits == 8 ? sum : from_bf16(load16(row)) * sum + from_bf16(load16(row + 2)) * total((const float *)&centred);
}

#endif

#define SHARE 64   /* rows that a thread takes at a time, at most: few enough for the second cache */
#define ALONE (1 << 19) /* weights that one thread has done before another has woken: about 10 us */
#define AHEAD 2048 /* bytes: rows are short, and what the processor foresees by itself ends at a page */

INLINE void add_stretch(int bits, int tokens, const uint8_t *row, int64_t columns, int64_t first, const stretch_t *x,
                        int64_t stretches, sum_t *scaled, sum_t *centred) {
    parts_t parts = parts_of(bits, row, columns);
    weights_t weights;
    const uint8_t *later = parts.codes + (bits == 8 ? first : first / 2) + AHEAD; /* of the next rows, too */
    const int lines = bits == 8 ? 8 : 5;
#pragma GCC unroll 8
    for (int i = 0; i < lines; i++) __builtin_prefetch(later + 64 * i);
    if (first + STRETCH <= columns) /* a constant, so that nothing is masked */
        weights = load_weights(bits, parts, first + STRETCH, first);
    else
        weights = load_weights(bits, parts, columns, first);
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++) add_products(bits, &weights, x + t * stretches, scaled + t, centred + t);
}

/* Rows [row, row + number) times some tokens: a constant, so that sums stay in registers. number: at most SHARE. */
INLINE void quick_rows(int bits, int tokens, const uint8_t *panels, int64_t row, int64_t number, int64_t columns,
                       const stretch_t *x, float *values) {
    int64_t bytes = affine_bytes(bits, columns), stretches = (columns + STRETCH - 1) / STRETCH;
    for (int64_t r = 0; r < number; r++) {
        const uint8_t *weights = panels + (row + r) * bytes;
        sum_t scaled[QUICK_TILE], centred[QUICK_TILE];
#pragma GCC unroll 4
        for (int t = 0; t < tokens; t++) scaled[t] = centred[t] = NO_SUM;
        for (int64_t i = 0; i < stretches; i++)
            add_stretch(bits, tokens, weights, columns, i * STRETCH, x + i, stretches, scaled, centred);
#pragma GCC unroll 4
        for (int t = 0; t < tokens; t++) values[t * SHARE + r] = total_of(bits, weights, scaled[t], centred[t]);
    }
}

typedef void (*quick_t)(const uint8_t *, int64_t, int64_t, int64_t, const stretch_t *, float *);

#define QUICK(bits, tokens)                                                                                            \
    static __attribute__((noinline)) void quick_##bits##_##tokens(                                                     \
        const uint8_t *panels, int64_t row, int64_t number, int64_t columns, const stretch_t *x, float *values) {      \
        quick_rows(bits, tokens, panels, row, number, columns, x, values);                                             \
    }
#define QUICK_OF(bits) QUICK(bits, 1) QUICK(bits, 2) QUICK(bits, 4)
QUICK_OF(4)
QUICK_OF(5)
QUICK_OF(6)
QUICK_OF(8)

static const quick_t QUICK_BY_TOKENS[4][3] = {{quick_4_1, quick_4_2, quick_4_4},
                                              {quick_5_1, quick_5_2, quick_5_4},
                                              {quick_6_1, quick_6_2, quick_6_4},
                                              {quick_8_1, quick_8_2, quick_8_4}};

static void quick_share(int bits, const uint8_t *panels, int64_t row, int64_t number, int64_t columns,
                        const stretch_t *x, int64_t tokens, int type, void *out, int64_t out_stride) {
    const quick_t *by = QUICK_BY_TOKENS[bits == 8 ? 3 : bits - 4];
    float values[QUICK_TILE * SHARE];
    int64_t stretches = (columns + STRETCH - 1) / STRETCH;
    int64_t most = QUICK_TILE * stretches * (int64_t)sizeof *x > FIRST_CACHE ? 2 : QUICK_TILE;
    for (int64_t t = 0; t < tokens;) {
        int some = SMALLER(tokens - t, most) / 2;
        by[some](panels, row, number, columns, x + t * stretches, values);
        for (int i = 0; i < 1 << some; i++, t++) put(values + i * SHARE, number, type, out, t * out_stride + row);
    }
}

/* 0, or 1 where there is no memory for x, there are too many tokens, or lamina_affine_linear is quicker. The arguments
   are those of lamina_affine_linear. */
int32_t lamina_affine_quick(const void *x, int64_t tokens, const uint8_t *panels, int64_t rows, int64_t columns,
                            int32_t bits, int32_t type, void *out, int64_t out_stride, int32_t threads) {
    if (tokens > QUICK_TOKENS || !QUICKER) return 1;
    stretch_t *to = aligned_alloc(64, (size_t)((columns + STRETCH - 1) / STRETCH * tokens) * sizeof *to);
    if (!to) return 1;
    quantise(x, type, tokens, columns, bits, bits == 8 ? OFFSET_OF_8 : 1 << (bits - 1), to);
    int64_t share = SMALLER(rows / (8 * threads) + 1, SHARE);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (rows * columns > ALONE)
    for (int64_t row = 0; row < rows; row += share)
        quick_share(bits, panels, row, SMALLER(rows - row, share), columns, to, tokens, type, out, out_stride);
    free(to);
    return 0;
}
