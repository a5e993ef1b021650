// What the prelude of kernels needs of a CPU. Each program for CPUs begins with this
// text: no header of C++ is read, which would take half of the time to compile it.

#define DEVICE static inline __attribute__((always_inline))
#if defined(__clang__)
#define LOOP _Pragma("clang loop vectorize(assume_safety)")
#else
#define LOOP _Pragma("GCC ivdep")
#endif
#define FLT_MAX 3.402823466e+38f

extern "C" {
void* memcpy(void*, const void*, __SIZE_TYPE__);
void* malloc(__SIZE_TYPE__);
void free(void*);
int sched_yield();
float fabsf(float), sqrtf(float), rintf(float), roundf(float), fmaf(float, float, float);
float ceilf(float), floorf(float), expf(float), exp2f(float), expm1f(float);
float logf(float), log1pf(float), log2f(float), cbrtf(float);
float sinf(float), cosf(float), tanf(float), asinf(float), acosf(float), atanf(float);
float sinhf(float), coshf(float), tanhf(float), asinhf(float), acoshf(float), atanhf(float);
float erff(float), erfcf(float), lgammaf(float);
float powf(float, float), atan2f(float, float), fmodf(float, float), nextafterf(float, float);
}

struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};

DEVICE float quotient(float x, float y) { return x / y; }
DEVICE float accurate_quotient(float x, float y) { return x / y; }
DEVICE float square_root(float x) { return sqrtf(x); }
DEVICE float rsqrtf(float x) { return 1 / sqrtf(x); }
DEVICE float rounded_quotient(float x, float y) { return x / y; }
DEVICE float rounded_root(float x) { return sqrtf(x); }
// A NaN if either is one. Without branches, of which compilers would make no vectors.
DEVICE float maximum(float x, float y) { return (x < y) | (y != y) ? y : x; }
DEVICE float minimum(float x, float y) { return (y < x) | (y != y) ? y : x; }

// M. Giles, "Approximating the erfinv function", GPU Computing Gems, 2011.
DEVICE float erfinvf(float x) {
  float w = -logf((1 - x) * (1 + x)), p;
  if (w < 5) {
    w -= 2.5f;
    p = 2.81022636e-08f;
    p = 3.43273939e-07f + p * w;
    p = -3.5233877e-06f + p * w;
    p = -4.39150654e-06f + p * w;
    p = 0.00021858087f + p * w;
    p = -0.00125372503f + p * w;
    p = -0.00417768164f + p * w;
    p = 0.246640727f + p * w;
    p = 1.50140941f + p * w;
  } else {
    w = sqrtf(w) - 3;
    p = -0.000200214257f;
    p = 0.000100950558f + p * w;
    p = 0.00134934322f + p * w;
    p = -0.00367342844f + p * w;
    p = 0.00573950773f + p * w;
    p = -0.0076224613f + p * w;
    p = 0.00943887047f + p * w;
    p = 1.00167406f + p * w;
    p = 2.83297682f + p * w;
  }
  return fabsf(x) == 1 ? x * __builtin_inff() : p * x;
}

DEVICE unsigned canonical_pattern(float x) {
  unsigned bits;
  memcpy(&bits, &x, 4);
  return x != x ? 0x7fc00000u : bits;
}
