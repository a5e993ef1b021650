// What the prelude of kernels needs of a GPU, for a CPU, where one thread has a whole
// group. The program of a kernel follows, and `launch`.

#include <utility>

#define __global__
#define __launch_bounds__(n)

struct Index {
  unsigned x;
};
// Of each device, whose kernel runs in a thread of its own.
static thread_local Index blockIdx, threadIdx;

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
