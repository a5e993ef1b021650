// What the prelude of kernels needs of a GPU, for a CPU, where one thread has a whole
// group. The program of a kernel follows, and `launch`.

#include <cfloat>
#include <cmath>
#include <cstring>
#include <utility>

using std::memcpy;

#define DEVICE static inline
#define __global__
#define __launch_bounds__(n)

struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
struct Index {
  unsigned x;
};
// Of each device, whose kernel runs in a thread of its own.
static thread_local Index blockIdx, threadIdx;

// Conversions of numbers of 16 bits, to nearest, halves to even.
template <class T>
static T narrowed(float x, int exponent_bits, int fraction_bits) {
  T result;
  if (std::isnan(x)) {
    result.bits = (unsigned short)(((1 << (exponent_bits + 1)) - 1) << (fraction_bits - 1));
    return result;
  }
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const double size = std::fabs((double)x);
  int exponent;
  std::frexp(size, &exponent);
  exponent = exponent - 1 < 1 - bias || size == 0 ? 1 - bias : exponent - 1;
  // In units of the last place.
  double units = std::nearbyint(std::ldexp(size, fraction_bits - exponent));
  long bits = (long)units + ((long)(exponent + bias - 1) << fraction_bits);
  const long infinity = ((1L << exponent_bits) - 1) << fraction_bits;
  if (std::isinf(x) || bits > infinity) bits = infinity;
  result.bits = (unsigned short)(bits | (std::signbit(x) ? 0x8000 : 0));
  return result;
}

static float reciprocal(float x) { return 1 / x; }
static float square_root(float x) { return std::sqrt(x); }
static float rsqrtf(float x) { return 1 / std::sqrt(x); }
static float rounded_quotient(float x, float y) { return x / y; }
static float rounded_root(float x) { return std::sqrt(x); }
static float maximum(float x, float y) { return x != x ? x : y != y ? y : x < y ? y : x; }
static float minimum(float x, float y) { return x != x ? x : y != y ? y : x < y ? x : y; }

static unsigned canonical_pattern(float x) {
  unsigned bits;
  memcpy(&bits, &x, 4);
  return x != x ? 0x7fc00000u : bits;
}

template <class T>
static T of_neighbour(T x, int) {
  return x;
}

// Calls a kernel with pointers of the types of its parameters.
template <class... Types, std::size_t... I>
static void call(void (*kernel)(Types...), void** arguments, std::index_sequence<I...>) {
  kernel((Types)arguments[I]...);
}

template <class... Types>
static void launch_all(void (*kernel)(Types...), void** arguments, unsigned blocks, unsigned threads) {
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) {
      call(kernel, arguments, std::index_sequence_for<Types...>());
    }
  }
}
