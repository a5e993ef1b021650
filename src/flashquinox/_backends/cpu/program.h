// What programs for CPUs are written with, after the prelude of all kernels.

// To nearest, halves to even.
DEVICE bfloat16 as_bfloat16(float x) {
  const unsigned bits = bit_cast<unsigned>(x);
  const unsigned rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return bfloat16(x != x ? 0x7fc0u : rounded);
}

// Likewise. A number that overflows is infinite.
DEVICE float16 as_float16(float x) {
  const unsigned bits = bit_cast<unsigned>(x), sign = bits >> 16 & 0x8000u;
  const unsigned size = bits & 0x7fffffffu;
  const unsigned normal = (size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13;
  // The last place of 0.5 is that of the smallest subnormal number.
  const unsigned small = bit_cast<unsigned>(bit_cast<float>(size) + 0.5f) - 0x3f000000u;
  const unsigned finite = size < 0x38800000u ? small : normal;
  const unsigned large = size > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return float16(sign | (size >= 0x477ff000u ? large : finite));
}

DEVICE float widened(float16 x) {
  const unsigned sign = (unsigned)(x & 0x8000) << 16, size = (unsigned)x & 0x7fffu;
  const float normal = bit_cast<float>((size << 13) + 0x38000000u);
  const float small = (float)(int)size * 0x1p-24f;
  const float large = bit_cast<float>(size << 13 | 0x7f800000u);
  const float found = size < 0x400u ? small : size >= 0x7c00u ? large : normal;
  return bit_cast<float>(bit_cast<unsigned>(found) | sign);
}

// The largest and the smallest of the elements of a group.
typedef float Vector __attribute__((vector_size(32)));
typedef float Half __attribute__((vector_size(16)));
typedef int HalfMask __attribute__((vector_size(16)));

#if defined(__clang__)
#define SWAPPED(x, a, b, c, d) __builtin_shufflevector(x, x, a, b, c, d)
#else
#define SWAPPED(x, a, b, c, d) __builtin_shuffle(x, HalfMask{a, b, c, d})
#endif

#define REDUCTION(name, is_better)                                        \
  template <class V>                                                      \
  DEVICE V better_##name(V x, V y) {                                      \
    return is_better | (y != y) ? y : x;                                  \
  }                                                                       \
  template <int N>                                                        \
  DEVICE float reduced_##name(const float* x) {                           \
    if constexpr (N % 8 == 0) {                                           \
      Vector all, next;                                                   \
      memcpy(&all, x, 32);                                                \
      for (int i = 8; i < N; i += 8) {                                    \
        memcpy(&next, x + i, 32);                                         \
        all = better_##name(all, next);                                   \
      }                                                                   \
      Half low, high;                                                     \
      memcpy(&low, &all, 16);                                             \
      memcpy(&high, (const char*)&all + 16, 16);                          \
      low = better_##name(low, high);                                     \
      low = better_##name(low, SWAPPED(low, 2, 3, 0, 1));                 \
      return better_##name(low, SWAPPED(low, 1, 0, 3, 2))[0];             \
    } else {                                                              \
      float all = x[0];                                                   \
      for (int i = 1; i < N; ++i) all = name(all, x[i]);                  \
      return all;                                                         \
    }                                                                     \
  }                                                                       \
  template <int N, class T>                                               \
  DEVICE T reduced_##name(const T* x) {                                   \
    T all = x[0];                                                         \
    for (int i = 1; i < N; ++i) all = name(all, x[i]);                    \
    return all;                                                           \
  }

REDUCTION(maximum, (x < y))
REDUCTION(minimum, (y < x))

// A leaf, as matrices whose groups run along the columns: see `View`.
struct Leaf {
  long long first_block, number, groups, elements, run, groups_of_run, columns, is_consecutive;
  // Those of the leaves before it.
  long long elements_before, groups_before;
};

// Where a group lies: its first element, how many it has, and how far these are apart.
struct Place {
  long long at, stride;
  int count;
};

DEVICE Place place_of(const Leaf& leaf, long long group, int group_size) {
  if (leaf.is_consecutive) {
    const long long at = group * group_size, left = leaf.elements - at;
    return {at, 1, left < group_size ? (int)left : group_size};
  }
  const long long column = group % leaf.columns, row = group / leaf.columns;
  const long long of_run = row % leaf.groups_of_run * group_size;
  const long long first_row = row / leaf.groups_of_run * leaf.run;
  const long long left = leaf.run - of_run;
  const int count = left < group_size ? (int)left : group_size;
  return {(first_row + of_run) * leaf.columns + column, leaf.columns, count};
}

// Elements of groups that do not lie one after the other, or that are partial. In place
// of elements that a group has not are copies of its last one.
template <int M, int N, class T>
static void load_groups(T (&to)[M][N], const T* from, const Place (&places)[M]) {
  for (int g = 0; g < M; ++g) {
    const Place place = places[g];
    for (int i = 0; i < N; ++i)
      to[g][i] = from[place.at + (i < place.count ? i : place.count - 1) * place.stride];
  }
}

template <int M, int N, class T>
static void store_groups(T* to, const T (&from)[M][N], const Place (&places)[M]) {
  for (int g = 0; g < M; ++g) {
    const Place place = places[g];
    for (int i = 0; i < place.count; ++i) to[place.at + i * place.stride] = from[g][i];
  }
}
