/* The blocks of GGUF files. A part of kernels.c, which includes it: rows and products are the same as of other codecs.

   Layouts are those of ggml-quants.c, see gguf_blocks.py for what each part of a block means. A scale has 11 bits, what it is
   multiplied with at most 8 and a level at most 6: where something is taken off afterwards the product is exact, so
   that it does not matter whether the compiler fuses the two. */

INLINE float half_at(const uint8_t *at) { return from_f16(load16(at)); }

INLINE void levels(words_t codes, int zero, float scale, float centre, float *out) {
    scale_codes((integers_t)codes - zero, scale, centre, out);
}

/* What has no centre is multiplied only: adding a zero would turn -0 into 0. */
INLINE void signed_levels(words_t codes, int zero, float scale, float *out) {
    floats_t values = __builtin_convertvector((integers_t)codes - zero, floats_t) * scale;
    memcpy(out, &values, sizeof values);
}

INLINE words_t lanes_from(uint32_t first) {
    words_t lane;
    for (uint32_t i = 0; i < WIDTH; i++) lane[i] = first + i;
    return lane;
}

INLINE void block_q4_0(const uint8_t *at, float *out) {
    float scale = half_at(at);
    for (int i = 0; i < 16; i += WIDTH) {
        words_t both = widen_bytes(at + 2 + i);
        signed_levels(both & 15, 8, scale, out + i);
        signed_levels(both >> 4, 8, scale, out + 16 + i);
    }
}

INLINE void block_q4_1(const uint8_t *at, float *out) {
    float scale = half_at(at), centre = half_at(at + 2);
    for (int i = 0; i < 16; i += WIDTH) {
        words_t both = widen_bytes(at + 4 + i);
        levels(both & 15, 0, scale, centre, out + i);
        levels(both >> 4, 0, scale, centre, out + 16 + i);
    }
}

INLINE void block_q5_0(const uint8_t *at, float *out) {
    float scale = half_at(at);
    uint32_t high = load32(at + 2);
    for (uint32_t i = 0; i < 16; i += WIDTH) {
        words_t both = widen_bytes(at + 6 + i), lane = lanes_from(i);
        signed_levels((both & 15) | (high >> lane << 4 & 16), 16, scale, out + i);
        signed_levels(both >> 4 | (high >> 16 >> lane << 4 & 16), 16, scale, out + 16 + i);
    }
}

INLINE void block_q5_1(const uint8_t *at, float *out) {
    float scale = half_at(at), centre = half_at(at + 2);
    uint32_t high = load32(at + 4);
    for (uint32_t i = 0; i < 16; i += WIDTH) {
        words_t both = widen_bytes(at + 8 + i), lane = lanes_from(i);
        levels((both & 15) | (high >> lane << 4 & 16), 0, scale, centre, out + i);
        levels(both >> 4 | (high >> 16 >> lane << 4 & 16), 0, scale, centre, out + 16 + i);
    }
}

INLINE void block_q8_0(const uint8_t *at, float *out) {
    float scale = half_at(at);
    for (int i = 0; i < 32; i += WIDTH)
        signed_levels((words_t)((integers_t)(widen_bytes(at + 2 + i) << 24) >> 24), 0, scale, out + i);
}

INLINE void block_q2_k(const uint8_t *at, float *out) {
    float scale = half_at(at + 80), minimum = half_at(at + 82);
    for (int group = 0; group < 16; group++) {
        float own = scale * (float)(at[group] & 15), centre = -(minimum * (float)(at[group] >> 4));
        const uint8_t *codes = at + 16 + group / 8 * 32 + group % 2 * 16;
        for (int i = 0; i < 16; i += WIDTH)
            levels(widen_bytes(codes + i) >> (group % 8 / 2 * 2) & 3, 0, own, centre, out + 16 * group + i);
    }
}

INLINE void block_q3_k(const uint8_t *at, float *out) {
    float scale = half_at(at + 108);
    const uint8_t *packed = at + 96;
    for (int group = 0; group < 16; group++) {
        int low = group < 8 ? packed[group] & 15 : packed[group - 8] >> 4;
        int high = packed[8 + group % 4] >> (group / 4 * 2) & 3;
        float own = scale * (float)((low | high << 4) - 32);
        const uint8_t *codes = at + 32 + group / 8 * 32 + group % 2 * 16, *bits = at + group % 2 * 16;
        for (int i = 0; i < 16; i += WIDTH) {
            words_t two = widen_bytes(codes + i) >> (group % 8 / 2 * 2) & 3;
            words_t third = widen_bytes(bits + i) >> (group / 2) & 1;
            signed_levels(two | third << 2, 4, own, out + 16 * group + i);
        }
    }
}

/* Scale and minimum of one of the eight groups of Q4_K and Q5_K. */
INLINE void six_bits(const uint8_t *at, int group, float *scale, float *centre) {
    const uint8_t *packed = at + 4;
    int s = packed[group & 3], m = packed[4 + (group & 3)], both = packed[8 + (group & 3)];
    int own = group < 4 ? s & 63 : (both & 15) | (s >> 2 & 48);
    int least = group < 4 ? m & 63 : both >> 4 | (m >> 2 & 48);
    *scale = half_at(at) * (float)own;
    *centre = -(half_at(at + 2) * (float)least);
}

INLINE void block_q4_k(const uint8_t *at, float *out) {
    for (int pair = 0; pair < 4; pair++) {
        float scale[2], centre[2];
        for (int k = 0; k < 2; k++) six_bits(at, 2 * pair + k, scale + k, centre + k);
        for (int i = 0; i < 32; i += WIDTH) {
            words_t both = widen_bytes(at + 16 + 32 * pair + i);
            levels(both & 15, 0, scale[0], centre[0], out + 64 * pair + i);
            levels(both >> 4, 0, scale[1], centre[1], out + 64 * pair + 32 + i);
        }
    }
}

INLINE void block_q5_k(const uint8_t *at, float *out) {
    for (int pair = 0; pair < 4; pair++) {
        float scale[2], centre[2];
        for (int k = 0; k < 2; k++) six_bits(at, 2 * pair + k, scale + k, centre + k);
        for (int i = 0; i < 32; i += WIDTH) {
            words_t both = widen_bytes(at + 48 + 32 * pair + i), bits = widen_bytes(at + 16 + i) >> 2 * pair;
            levels((both & 15) | (bits & 1) << 4, 0, scale[0], centre[0], out + 64 * pair + i);
            levels(both >> 4 | (bits & 2) << 3, 0, scale[1], centre[1], out + 64 * pair + 32 + i);
        }
    }
}

INLINE void block_q6_k(const uint8_t *at, float *out) {
    float scale = half_at(at + 208);
    for (int group = 0; group < 16; group++) {
        int half = group / 8, run = group % 8 / 2, part = group % 2 * 16;
        float own = scale * (float)(int8_t)at[192 + group];
        const uint8_t *low = at + 64 * half + run % 2 * 32 + part, *high = at + 128 + 32 * half + part;
        for (int i = 0; i < 16; i += WIDTH) {
            words_t four = widen_bytes(low + i) >> (run / 2 * 4) & 15, two = widen_bytes(high + i) >> 2 * run & 3;
            signed_levels(four | two << 4, 32, own, out + 16 * group + i);
        }
    }
}

static const int32_t iq4_levels[16] ALIGNED = {-127, -104, -83, -65, -49, -35, -22, -10,
                                               1,    13,   25,  38,  53,  69,  89,  113};
static const int32_t fp4_levels[16] ALIGNED = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

INLINE words_t look_up(const int32_t *table, words_t codes) {
#if defined(__AVX512F__)
    return (words_t)_mm512_permutexvar_epi32((__m512i)codes, _mm512_load_si512(table));
#else
    words_t found;
    for (int i = 0; i < WIDTH; i++) found[i] = (uint32_t)table[codes[i]];
    return found;
#endif
}

INLINE void looked_up(const int32_t *table, const uint8_t *nibbles, float scale, float *out) {
    for (int i = 0; i < 16; i += WIDTH) {
        words_t both = widen_bytes(nibbles + i);
        signed_levels(look_up(table, both & 15), 0, scale, out + i);
        signed_levels(look_up(table, both >> 4), 0, scale, out + 16 + i);
    }
}

INLINE void block_iq4_nl(const uint8_t *at, float *out) { looked_up(iq4_levels, at + 2, half_at(at), out); }

INLINE void block_iq4_xs(const uint8_t *at, float *out) {
    float scale = half_at(at);
    for (int group = 0; group < 8; group++) {
        int low = at[4 + group / 2] >> (group % 2 * 4) & 15, high = load16(at + 2) >> 2 * group & 3;
        looked_up(iq4_levels, at + 8 + 16 * group, scale * (float)((low | high << 4) - 32), out + 32 * group);
    }
}

INLINE void block_mxfp4(const uint8_t *at, float *out) {
    uint32_t exponent = at[0];
    float scale = float_of(exponent < 2 ? 0x00200000u << exponent : (exponent - 1) << 23);
    looked_up(fp4_levels, at + 1, scale, out);
}

/* Types whose blocks hold places in a code book of points. The books are given once, as the gguf package has them. */

enum { XXS2, XS2, S2, XXS3, S3, ONE, BOOKS };
static int8_t books[BOOKS][2048 * 8] ALIGNED;
static int32_t book_given[BOOKS];

/* 0, or 1 where there is no such book. */
int32_t lamina_gguf_book(int32_t book, const int8_t *points, int64_t count) {
    if (book < 0 || book >= BOOKS || count < 0 || count > (int64_t)sizeof books[0]) return 1;
    memcpy(books[book], points, (size_t)count);
    book_given[book] = 1;
    return 0;
}

INLINE void points(const int8_t *from, int count, uint32_t signs, float scale, float *out) {
    for (int i = 0; i < count; i++) out[i] = float_of(bits_of(scale * (float)from[i]) ^ (signs >> i & 1) << 31);
}

/* Seven signs, and an eighth that makes their number even. */
INLINE uint32_t eight_signs(uint32_t seven) {
    seven &= 127;
    return seven | (uint32_t)(__builtin_popcount(seven) & 1) << 7;
}

INLINE void block_iq2_xxs(const uint8_t *at, float *out) {
    for (int group = 0; group < 8; group++) {
        const uint8_t *places = at + 2 + 8 * group;
        uint32_t rest = load32(places + 4);
        float scale = half_at(at) * (0.5f + (float)(rest >> 28)) * 0.25f;
        for (int j = 0; j < 4; j++)
            points(books[XXS2] + 8 * places[j], 8, eight_signs(rest >> 7 * j), scale, out + 32 * group + 8 * j);
    }
}

INLINE void block_iq2_xs(const uint8_t *at, float *out) {
    for (int j = 0; j < 32; j++) {
        uint32_t code = load16(at + 2 + 2 * j);
        float scale = half_at(at) * (0.5f + (float)(at[66 + j / 4] >> (j / 2 % 2 * 4) & 15)) * 0.25f;
        points(books[XS2] + 8 * (code & 511), 8, eight_signs(code >> 9), scale, out + 8 * j);
    }
}

INLINE void block_iq2_s(const uint8_t *at, float *out) {
    for (int j = 0; j < 32; j++) {
        int place = at[2 + j] | (at[66 + j / 4] >> (j % 4 * 2) & 3) << 8;
        float scale = half_at(at) * (0.5f + (float)(at[74 + j / 4] >> (j / 2 % 2 * 4) & 15)) * 0.25f;
        points(books[S2] + 8 * place, 8, at[34 + j], scale, out + 8 * j);
    }
}

INLINE void block_iq3_xxs(const uint8_t *at, float *out) {
    for (int group = 0; group < 8; group++) {
        const uint8_t *places = at + 2 + 8 * group;
        uint32_t rest = load32(at + 66 + 4 * group);
        float scale = half_at(at) * (0.5f + (float)(rest >> 28)) * 0.5f;
        for (int j = 0; j < 8; j++) {
            uint32_t signs = eight_signs(rest >> j / 2 * 7) >> j % 2 * 4;
            points(books[XXS3] + 4 * places[j], 4, signs, scale, out + 32 * group + 4 * j);
        }
    }
}

INLINE void block_iq3_s(const uint8_t *at, float *out) {
    for (int j = 0; j < 64; j++) {
        int place = at[2 + j] | (at[66 + j / 8] >> (j % 8) & 1) << 8;
        float scale = half_at(at) * (float)(1 + 2 * (at[106 + j / 16] >> (j / 8 % 2 * 4) & 15));
        points(books[S3] + 4 * place, 4, (uint32_t)at[74 + j / 2] >> j % 2 * 4, scale, out + 4 * j);
    }
}

INLINE void shifted_points(const int8_t *from, float shift, float scale, float *out) {
    for (int i = 0; i < 8; i++) out[i] = scale * ((float)from[i] + shift);
}

INLINE void block_iq1_s(const uint8_t *at, float *out) {
    for (int j = 0; j < 32; j++) {
        int high = load16(at + 34 + j / 4 * 2), place = at[2 + j] | (high >> (j % 4 * 3) & 7) << 8;
        float scale = half_at(at) * (float)(2 * (high >> 12 & 7) + 1);
        shifted_points(books[ONE] + 8 * place, high & 0x8000 ? -0.125f : 0.125f, scale, out + 8 * j);
    }
}

INLINE void block_iq1_m(const uint8_t *at, float *out) {
    uint32_t half = 0;
    for (int i = 0; i < 4; i++) half |= (uint32_t)(load16(at + 48 + 2 * i) >> 12) << 4 * i;
    float unit = from_f16((uint16_t)half);
    for (int j = 0; j < 32; j++) {
        int high = at[32 + j / 2] >> (j % 2 * 4) & 15, place = at[j] | (high & 7) << 8;
        float scale = unit * (float)(2 * (load16(at + 48 + j / 8 * 2) >> (j / 2 % 4 * 3) & 7) + 1);
        shifted_points(books[ONE] + 8 * place, high & 8 ? -0.125f : 0.125f, scale, out + 8 * j);
    }
}

/* name, elements and bytes of a block, number in a GGUF file; then the book that it needs */
#define GGUF_TYPES(X)                                                                                                  \
    X(q4_0, 32, 18, 2, -1)                                                                                             \
    X(q4_1, 32, 20, 3, -1)                                                                                             \
    X(q5_0, 32, 22, 6, -1)                                                                                             \
    X(q5_1, 32, 24, 7, -1)                                                                                             \
    X(q8_0, 32, 34, 8, -1)                                                                                             \
    X(q2_k, 256, 84, 10, -1)                                                                                           \
    X(q3_k, 256, 110, 11, -1)                                                                                          \
    X(q4_k, 256, 144, 12, -1)                                                                                          \
    X(q5_k, 256, 176, 13, -1)                                                                                          \
    X(q6_k, 256, 210, 14, -1)                                                                                          \
    X(iq4_nl, 32, 18, 20, -1)                                                                                          \
    X(iq4_xs, 256, 136, 23, -1)                                                                                        \
    X(mxfp4, 32, 17, 39, -1)                                                                                           \
    X(iq2_xxs, 256, 66, 16, XXS2)                                                                                      \
    X(iq2_xs, 256, 74, 17, XS2)                                                                                        \
    X(iq2_s, 256, 82, 22, S2)                                                                                          \
    X(iq3_xxs, 256, 98, 18, XXS3)                                                                                      \
    X(iq3_s, 256, 110, 21, S3)                                                                                         \
    X(iq1_s, 256, 50, 19, ONE)                                                                                         \
    X(iq1_m, 256, 56, 29, ONE)

#define GGUF_SPAN(name, elements, bytes, number, book)                                                                 \
    static void span_##name(const uint8_t *row, int64_t columns, int64_t first, int64_t count, float *out) {           \
        (void)columns;                                                                                                 \
        const uint8_t *at = row + first / elements * bytes;                                                            \
        for (int64_t i = 0; i < count; i += elements, at += bytes, out += elements) block_##name(at, out);             \
    }
GGUF_TYPES(GGUF_SPAN)

/* Gives the bytes of a row; leaves decode for a type that is not known here, or whose book is not. */
static int64_t gguf_type(int number, int64_t columns, span_t *decode) {
    switch (number) {
#define GGUF_CASE(name, elements, bytes, number, book)                                                                 \
    case number:                                                                                                       \
        if (book >= 0 && !book_given[book < 0 ? 0 : book]) return 0;                                                   \
        *decode = span_##name;                                                                                         \
        return columns / elements * bytes;
        GGUF_TYPES(GGUF_CASE)
    }
    return 0;
}

int32_t lamina_gguf_decode(const uint8_t *panels, int64_t rows, int64_t columns, int32_t number, int32_t type, void *out,
                           int32_t threads) {
    span_t decode = NULL;
    int64_t bytes = gguf_type(number, columns, &decode);
    if (!decode) return 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * columns > 65536)
    for (int64_t row = 0; row < rows; row++) {
        float values[SPAN] ALIGNED;
        for (int64_t first = 0; first < columns; first += SPAN) {
            int64_t count = SMALLER(columns - first, SPAN);
            decode(panels + row * bytes, columns, first, count, values);
            put(values, count, type, out, row * columns + first);
        }
    }
    return 0;
}

/* 0, or 1 where the type is not known or there is no memory for x in fp32. */
int32_t lamina_gguf_linear(const void *x, int64_t tokens, const uint8_t *panels, int64_t rows, int64_t columns,
                           int32_t number, int32_t type, void *out, int64_t out_stride, int32_t threads) {
    span_t decode = NULL;
    int64_t bytes = gguf_type(number, columns, &decode);
    if (!decode || tokens > TOKENS_MAX) return 1;
    float *wide = aligned_alloc(64, (size_t)((columns + SPAN - 1) / SPAN * SPAN * tokens) * 4);
    if (!wide) return 1;
    widen(x, type, tokens, columns, wide);
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads) if (rows * columns > 65536)
    for (int64_t row = 0; row < rows; row += TILE_ROWS) {
        int own = (int)SMALLER(rows - row, TILE_ROWS);
        linear_rows(decode, bytes, panels, row, own, columns, wide, tokens, type, out, out_stride);
    }
    free(wide);
    return 0;
}
