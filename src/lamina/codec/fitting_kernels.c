/* Encoding q4, q5, q6 and q8. A part of kernels.c; fitting.py says how, and does the same in torch.

   The search takes sixteen groups at a time, one to a lane. The sums are those of whole numbers below 2^24: exact, so
   that it does not matter here whether the compiler fuses a product into a sum. */

#define REACH 8191.0f /* as in fitting.py */
#define TINY 1e-33f

/* A number no less than `least` and no more than `most`; `least` where it is none, which has no integer. */
INLINE float within(float value, float least, float most) {
    value = value > least ? value : least;
    return value < most ? value : most;
}

typedef struct {
    float number[LANES], squares[LANES], products[LANES];
} sums_t;

INLINE sums_t sum_codes(float x[GROUP][LANES], float step, float origin, int bits) {
    sums_t sums = {{0}, {0}, {0}};
    float factor = 1 / step, most = (float)((1 << (bits - 1)) - 1);
    for (int i = 0; i < GROUP; i++)
        for (int g = 0; g < LANES; g++) {
            float code = rintf((x[i][g] - origin) * factor);
            code = within(code, -most - 1, most);
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
        code = within(code, -half, half - 1);
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
        if (!finite) return 0;
        scale = up_to_bf16((fabsf(high) > fabsf(low) ? fabsf(high) : fabsf(low)) / 127);
        factor = scale > TINY ? 1 / scale : 0;
        for (int i = 0; i < BLOCK; i++) {
            float code = within(rintf(x[i] * factor), -127, 127);
            codes[i] = (int8_t)(int32_t)code;
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
    if (!finite) return 0; /* whole numbers of what follows would be none */
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
        s = within(s, it->scale[g] > 0 ? 1 : 0, 255);
        c = within(c, -127, 127);
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
