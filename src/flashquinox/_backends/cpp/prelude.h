// What kernels are written with. Each begins with this text. Where another compiler than
// NVIDIA's reads it, as in the tests, that brings its own for what is NVIDIA's alone.

#ifdef __CUDACC_RTC__
#define DEVICE static __device__ __forceinline__
#define FLT_MAX 3.402823466e+38f
#endif

// Numbers as they are stored: their bits. Arithmetic is in float. Compilers for CPUs put
// integers into vectors, and no structures.
enum bfloat16 : unsigned short {};
enum float16 : unsigned short {};

template <class To, class From>
DEVICE To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From), "");
  To result;
  memcpy(&result, &x, sizeof(To));
  return result;
}

DEVICE float widened(bfloat16 x) {
  return bit_cast<float>((unsigned)x << 16);
}

#ifdef __CUDACC_RTC__

DEVICE bfloat16 as_bfloat16(float x) {
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bfloat16(bits);
}

DEVICE float widened(float16 x) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"((unsigned short)x));
  return result;
}

DEVICE float16 as_float16(float x) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return float16(bits);
}

// Its error is at most one unit in the last place (PTX ISA, "rcp").
DEVICE float reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Its relative error is at most 2^-23 (PTX ISA, "sqrt").
DEVICE float square_root(float x) {
  float result;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

DEVICE float rounded_quotient(float x, float y) { return __fdiv_rn(x, y); }
DEVICE float rounded_root(float x) { return __fsqrt_rn(x); }

// A NaN if either is one.
DEVICE float maximum(float x, float y) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(y));
  return result;
}

DEVICE float minimum(float x, float y) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(y));
  return result;
}

// The bits of a number that arithmetic has made, with one pattern for NaN: arithmetic
// gives no other NaN than 0x7fffffff.
DEVICE unsigned canonical_pattern(float x) {
  int bits = __float_as_int(x);
  return bits < 0x7fc00000 ? bits : 0x7fc00000;
}

// The value of the neighbouring lane whose number differs by `step`, which is a power
// of two.
template <class T>
DEVICE T of_neighbour(T x, int step) {
  return __shfl_xor_sync(0xffffffffu, x, step);
}

#endif

template <class T>
DEVICE T maximum(T x, T y) { return x < y ? y : x; }
template <class T>
DEVICE T minimum(T x, T y) { return x < y ? x : y; }

// As XLA has them where there is no quotient.
template <class T>
DEVICE T integer_quotient(T x, T y) {
  if (y == T(0)) return T(-1);
  return y == T(-1) ? T(0u - (unsigned)x) : T(x / y);
}
template <class T>
DEVICE T integer_remainder(T x, T y) {
  if (y == T(0)) return x;
  return T(-1) < T(0) && y == T(-1) ? T(0) : T(x % y);
}

DEVICE float sign(float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : x; }

#ifdef __CUDACC_RTC__

// To `int` and to `unsigned`, the nearest one that there is, and 0 for NaN.
template <class T>
DEVICE T to_integer(float x) { return sizeof(T) < 4 ? (T)(int)x : (T)x; }

DEVICE float quotient(float x, float y) { return x * reciprocal(y); }

// Mostly the nearest number, where a product with a reciprocal has an error of up to two
// units in the last place.
DEVICE float accurate_quotient(float x, float y) {
  const float inverse = reciprocal(y), near = x * inverse;
  const float nearer = fmaf(fmaf(-y, near, x), inverse, near);
  // Not where the quotient is infinite.
  return nearer == nearer ? nearer : near;
}

#else

// The integer next to zero, as XLA has it: the nearest one of those that there are, and 0
// for NaN. Conversions in C++ are of numbers in their range.
template <class T>
DEVICE T to_integer(float x) {
  constexpr int bits = 8 * sizeof(T);
  constexpr bool is_signed = T(-1) < T(0);
  constexpr float end = is_signed ? 1u << (bits - 1) : 2.0f * (1u << (bits - 1));
  constexpr float first = is_signed ? -end : 0.0f;
  // Of numbers below `end`, the largest.
  constexpr float last = bits > 24 ? end * (1 - 0x1p-24f) : end - 1;
  float near = x < first ? first : x;
  near = last < near ? last : near;
  const T found = (T)(near == near ? near : 0.0f);
  if constexpr (bits > 24) return x >= end ? (T)(is_signed ? ~0u >> 1 : ~0u) : found;
  return found;
}

#endif

template <int N, class T>
DEVICE T power(T x) {
  if constexpr (N < 0) {
    return T(1) / power<-N>(x);
  } else if constexpr (N == 0) {
    return T(1);
  } else if constexpr (N % 2 == 0) {
    return power<N / 2>(x * x);
  } else {
    return x * power<N - 1>(x);
  }
}

// Shifts by at least as many places as there are bits leave nothing.
DEVICE unsigned shifted_left(unsigned x, unsigned n) { return n < 32 ? x << n : 0; }
DEVICE unsigned shifted_right(unsigned x, unsigned n) { return n < 32 ? x >> n : 0; }
DEVICE int shifted_right_signed(int x, unsigned n) { return x >> (n < 32 ? n : 31); }

template <int Bytes>
struct Word;
template <>
struct Word<16> { using type = uint4; };
template <>
struct Word<8> { using type = uint2; };
template <>
struct Word<4> { using type = unsigned; };
template <>
struct Word<2> { using type = unsigned short; };
template <>
struct Word<1> { using type = unsigned char; };

// What is loaded at once, of elements that lie one after the other: of `Aligned` of
// them, which start at a multiple of their size, but at most 16 bytes.
template <int Aligned, class T>
struct Words {
  static constexpr int bytes = Aligned * sizeof(T) < 16 ? Aligned * sizeof(T) : 16;
  static constexpr int each = bytes / sizeof(T);
  using type = typename Word<bytes>::type;
};

// The elements of a group that one thread has: `N` of them, which lie `stride` apart.
// `Aligned` is 1 if `stride` is not.
template <int N, int Aligned, class T>
DEVICE void load(T (&x)[N], const T* from, long long stride) {
  using W = Words<Aligned, T>;
#pragma unroll
  for (int i = 0; i < N; i += W::each) {
    const auto word = *(const typename W::type*)(from + i * stride);
    memcpy(x + i, &word, W::bytes);
  }
}

template <int N, int Aligned, class T>
DEVICE void store(T (&x)[N], T* to, long long stride) {
  using W = Words<Aligned, T>;
#pragma unroll
  for (int i = 0; i < N; i += W::each) {
    typename W::type word;
    memcpy(&word, x + i, W::bytes);
    *(typename W::type*)(to + i * stride) = word;
  }
}

// The same where only `count` of them exist. In place of the others are copies of the
// last one of the group: these change neither its largest nor its smallest element.
template <int N, class T>
DEVICE void load_part(T (&x)[N], const T* from, int count, long long stride) {
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = from[(i < count ? i : count - 1) * stride];
}

template <int N, class T>
DEVICE void store_part(T (&x)[N], T* to, int count, long long stride) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < count) to[i * stride] = x[i];
  }
}
