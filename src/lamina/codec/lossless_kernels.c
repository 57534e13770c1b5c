/* bf16z. A part of kernels.c; the format is in lossless.py. */

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
    place.escape = SMALLER(place.escape, it->end - it->escapes); /* so that no address is beyond the panel's */
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
        uint8_t ranked[FIRST + SECOND], *panel = out ? out + index * panel_bytes : NULL;
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
