// The custom call of XLA: the blocks of all leaves, which threads of XLA take one by one.

struct Call {
  const Leaf* leaves;
  long long number_of_leaves;
  // The models that take a step together, and the blocks of each; how many groups a block
  // has at most, and how many threads have enough to do.
  long long members, blocks, groups_of_block, threads;
  // Of all leaves of a model.
  long long elements, groups;
  // How far apart the words of models are: 0 where they share them.
  const long long* strides;
  void** in;
  void** out;
};

static void take_block(const Call& call, const Leaf& leaf, unsigned number, long long member, long long block);

// A block of all of them: of a leaf of a model.
static void take(const Call& call, long long block) {
  const long long member = block / call.blocks;
  block %= call.blocks;
  long long first = 0, last = call.number_of_leaves;
  while (last - first > 1) {
    const long long middle = (first + last) / 2;
    if (block < call.leaves[middle].first_block) last = middle;
    else first = middle;
  }
  take_block(call, call.leaves[first], (unsigned)first, member, block - call.leaves[first].first_block);
}

// What threads share. The last one that leaves it frees it: some of them may start when
// there is nothing left to do, and the call is over.
struct Work {
  const Call* call;
  long long blocks;
  long long next, done, users;
};

static void leave(Work* work) {
  if (__atomic_sub_fetch(&work->users, 1, __ATOMIC_ACQ_REL) == 0) free(work);
}

static void take_blocks(Work* work) {
  for (;;) {
    const long long block = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
    if (block >= work->blocks) return;
    take(*work->call, block);
    __atomic_add_fetch(&work->done, 1, __ATOMIC_RELEASE);
  }
}

static void help(void* data) {
  Work* work = (Work*)data;
  take_blocks(work);
  leave(work);
}

static void take_all(const XLA_FFI_CallFrame* frame, const Call& call) {
  const XLA_FFI_Api* api = frame->api;
  const long long blocks = call.members * call.blocks;
  if (blocks == 0) return;
  int64_t threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args ask = {};
  ask.struct_size = XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE;
  ask.ctx = frame->ctx;
  ask.num_threads = &threads;
  XLA_FFI_Error* error = call.threads > 1 ? api->XLA_FFI_ThreadPool_NumThreads(&ask) : nullptr;
  if (error) threads = 1;
  const long long helpers = (threads < call.threads ? threads : call.threads) - 1;
  Work* work = (Work*)malloc(sizeof(Work));
  *work = {&call, blocks, 0, 0, helpers + 1};
  for (long long i = 0; i < helpers; ++i) {
    XLA_FFI_ThreadPool_Schedule_Args task = {};
    task.struct_size = XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE;
    task.ctx = frame->ctx;
    task.task = help;
    task.data = work;
    if (!error) error = api->XLA_FFI_ThreadPool_Schedule(&task);
    if (error) leave(work);
  }
  if (error) {
    // This thread does it all.
    XLA_FFI_Error_Destroy_Args destroy = {};
    destroy.struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE;
    destroy.error = error;
    api->XLA_FFI_Error_Destroy(&destroy);
  }
  take_blocks(work);
  // Only of blocks that a thread is working on.
  while (__atomic_load_n(&work->done, __ATOMIC_ACQUIRE) < blocks) sched_yield();
  leave(work);
}

extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* NAME(XLA_FFI_CallFrame* frame) {
  auto* extension = frame->extension_start;
  if (extension && extension->type == XLA_FFI_Extension_Metadata) {
    XLA_FFI_Metadata* metadata = ((XLA_FFI_Metadata_Extension*)extension)->metadata;
    metadata->api_version.major_version = XLA_FFI_API_MAJOR;
    metadata->api_version.minor_version = XLA_FFI_API_MINOR;
    return nullptr;
  }
  const XLA_FFI_Array* plan = (const XLA_FFI_Array*)frame->attrs.attrs[0];
  const long long* numbers = (const long long*)plan->data;
  const int64_t operands = frame->args.size, results = frame->rets.size;
  // Not where a thread has its variables: there may be thousands.
  void** in = (void**)malloc((operands + results) * sizeof(void*));
  void** out = in + operands;
  for (int64_t i = 0; i < operands; ++i) in[i] = ((XLA_FFI_Buffer*)frame->args.args[i])->data;
  for (int64_t i = 0; i < results; ++i) out[i] = ((XLA_FFI_Buffer*)frame->rets.rets[i])->data;
  const Call call = {(const Leaf*)(numbers + 9), numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6], numbers + 7, in, out};
  take_all(frame, call);
  free(in);
  return nullptr;
}
