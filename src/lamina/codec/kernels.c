/* Kernels of lamina.codec: compiled on first use by native.py, which also declares the types for ctypes.

   One unit of several files, so that their parts are inlined into each other. Loops have fixed lengths, so that any
   compiler turns them into the vectors of the machine at hand; only what compilers cannot see has intrinsics, with a
   portable twin. Nothing here trusts a byte of a panel: values may be anything, every offset is held inside. */

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

#include "affine_kernels.c"
#include "fitting_kernels.c"
#include "gguf_kernels.c"
#include "lossless_kernels.c"
#include "quick_kernels.c"
#include "rows_kernels.c"

int32_t lamina_kernels_version(void) { return 1; }
