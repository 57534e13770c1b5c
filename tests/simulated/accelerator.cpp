// An accelerator that is not there: torch's device "simulated", with what makes a real one hard to use rightly.
//
// torch keeps one device type, PrivateUse1, for backends that live outside it. Whoever registers an allocator, a
// device guard (streams and events) and kernels for it has a device that all of torch's Python works with.
//
// What is as on a CUDA device:
//   - Memory is separate. A tensor's address cannot be read or written by the host: doing so is a segmentation fault.
//   - Work is queued on streams and done late: in order within a stream, and between streams in any order that the
//     events allow. Copies *and* computations are late. `set_schedule` chooses how late.
//   - A copy from pinned memory reads its source when it is done, one from pageable memory when it is queued.
//   - The allocator keeps freed blocks and gives them out again at once, whatever is still queued, unless
//     `record_stream` named the stream that uses them.
//   - Host memory is pinned by a register, which refuses what overlaps (712) and what it does not hold (713). It pins
//     pages, not addresses: who unmaps registered memory and maps other memory there copies the old bytes.
//   - In a forked child nothing works.
// What is not: speed; several devices; kernels of its own (the processor's compute, on the device's memory, so that
// results are those of the processor bit for bit); late copies to the host (they wait for their stream); priorities.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/PythonFallbackKernel.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <torch/extension.h>
#include <unistd.h>

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>

namespace {

constexpr auto kDevice = c10::DeviceType::PrivateUse1;
constexpr int64_t kDefaultStream = 0;
constexpr size_t kPage = 4096;
constexpr int kPoison = 0x5A;  // fills memory that was given to somebody and not yet written
constexpr int kAlreadyRegistered = 712, kNotRegistered = 713, kInvalidValue = 1;  // CUDA's numbers

std::recursive_mutex mutex;
using Lock = std::lock_guard<std::recursive_mutex>;
bool forked = false;
thread_local int64_t current_stream = kDefaultStream;

void must_be_usable() {
  TORCH_CHECK(!forked, "simulated: the accelerator cannot be used in a forked process");
}

// ------------------------------------------------------------------------------------------ streams and events

// A point in a stream's queue.
struct Mark {
  int64_t stream;
  bool passed = false;
};
using MarkPtr = std::shared_ptr<Mark>;

// One piece of queued work: waits for `after`, does `work`, passes `mark`; each may be missing.
struct Task {
  std::function<void()> work;
  MarkPtr after;
  MarkPtr mark;
};

std::map<int64_t, std::deque<Task>> queues;
int64_t next_stream = 1;
std::mt19937 chance(0);
double copies_eager = 0, computes_eager = 0;  // chance, at each look, that a stream that may go on does one task
long running = 0;

bool may_go_on(const std::deque<Task>& queue) {
  return !queue.empty() && !(queue.front().after && !queue.front().after->passed);
}

void do_first(std::deque<Task>& queue) {
  Task task = std::move(queue.front());
  queue.pop_front();
  running++;
  try {
    if (task.work) task.work();
  } catch (...) {
    running--;
    if (task.mark) task.mark->passed = true;
    throw;
  }
  running--;
  if (task.mark) task.mark->passed = true;
}

// Do what `mark` needs, and nothing else: other streams go on only as far as a wait asks for.
void wait_for(const MarkPtr& mark) {
  while (!mark->passed) {
    auto& queue = queues[mark->stream];
    TORCH_CHECK(!queue.empty(), "simulated: an event that never comes");
    if (!may_go_on(queue)) wait_for(queue.front().after);
    else do_first(queue);
  }
}

void finish(int64_t stream) {
  auto& queue = queues[stream];
  while (!queue.empty()) {
    if (!may_go_on(queue)) wait_for(queue.front().after);
    else do_first(queue);
  }
}

void finish_all() {
  for (auto& [stream, queue] : queues) finish(stream);
}

// Time goes by: perhaps something is done. Called at every call into the device.
void look() {
  if (running) return;
  std::uniform_real_distribution<double> draw(0, 1);
  bool again = true;
  while (again) {
    again = false;
    for (auto& [stream, queue] : queues) {
      double eager = stream == kDefaultStream ? computes_eager : copies_eager;
      if (!may_go_on(queue) || draw(chance) >= eager) continue;
      do_first(queue);
      again = true;
    }
  }
}

MarkPtr mark_now(int64_t stream) {
  auto mark = std::make_shared<Mark>(Mark{stream});
  queues[stream].push_back({nullptr, nullptr, mark});
  return mark;
}

void enqueue(std::function<void()> work) {
  queues[current_stream].push_back({std::move(work), nullptr, nullptr});
  look();
}

// ------------------------------------------------------------------------------------------ device memory

// Mapped twice: where tensors believe it to be, without any permission, and where kernels find it.
struct Block {
  char* address;
  char* bytes;
  size_t mapped;
  size_t asked;
  int64_t owner;      // the stream that was current when it was given out: its own work needs no record_stream
  uint64_t life = 0;  // a new one each time that it is given out; 0 while it is free
  std::set<int64_t> users;
};

std::map<char*, Block> blocks;  // all, by address
std::multimap<size_t, char*> free_blocks;
struct Retiring {
  char* address;
  std::vector<MarkPtr> until;
};
std::vector<Retiring> retiring;  // freed, but streams that record_stream named are not past it
uint64_t lives = 0;
size_t in_use = 0, most_in_use = 0, reserved = 0, capacity = size_t(4) << 30;
long strays = 0;  // copies into memory that had been given back meanwhile

Block& block_of(const void* address) {
  auto found = blocks.upper_bound((char*)address);
  TORCH_CHECK(found != blocks.begin(), "simulated: not memory of the device");
  Block& block = std::prev(found)->second;
  TORCH_CHECK((char*)address < block.address + block.mapped, "simulated: not memory of the device");
  return block;
}

char* bytes_at(const void* address) {
  Block& block = block_of(address);
  return block.bytes + ((char*)address - block.address);
}

Block map_block(size_t nbytes) {
  int file = memfd_create("simulated", MFD_CLOEXEC);
  TORCH_CHECK(file >= 0 && ftruncate(file, nbytes) == 0, "simulated: no memory");
  void* bytes = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  void* address = mmap(nullptr, nbytes, PROT_NONE, MAP_SHARED, file, 0);
  close(file);
  TORCH_CHECK(bytes != MAP_FAILED && address != MAP_FAILED, "simulated: no memory");
  memset(bytes, kPoison, nbytes);
  return {(char*)address, (char*)bytes, nbytes, 0, kDefaultStream};
}

void retire_what_is_past() {
  for (auto each = retiring.begin(); each != retiring.end();) {
    bool past = true;
    for (auto& mark : each->until) past = past && mark->passed;
    if (!past) {
      ++each;
      continue;
    }
    Block& block = blocks.at(each->address);
    block.life = 0;
    free_blocks.emplace(block.mapped, block.address);
    each = retiring.erase(each);
  }
}

void give_back_block(void* address) {
  if (!address || forked) return;
  Lock lock(mutex);
  Block& block = blocks.at((char*)address);
  in_use -= block.asked;
  std::vector<MarkPtr> until;
  for (auto stream : block.users)
    if (stream != block.owner && !queues[stream].empty()) until.push_back(mark_now(stream));
  block.users.clear();
  retiring.push_back({block.address, std::move(until)});
  retire_what_is_past();
}

void empty_cache() {
  finish_all();  // the driver waits for the device before it unmaps
  retire_what_is_past();
  for (auto& [size, address] : free_blocks) {
    Block& block = blocks.at(address);
    munmap(block.address, block.mapped);
    munmap(block.bytes, block.mapped);
    reserved -= size;
    blocks.erase(address);
  }
  free_blocks.clear();
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t nbytes) override {
    const c10::Device device(kDevice, 0);
    if (!nbytes) return {nullptr, nullptr, &give_back_block, device};
    must_be_usable();
    Lock lock(mutex);
    look();
    retire_what_is_past();
    size_t size = (nbytes + kPage - 1) / kPage * kPage;
    auto found = free_blocks.lower_bound(size);
    char* address = nullptr;
    if (found != free_blocks.end() && found->first <= 2 * size) {
      address = found->second;
      free_blocks.erase(found);
      if (queues[kDefaultStream].empty()) memset(blocks.at(address).bytes, kPoison, blocks.at(address).mapped);
    } else {
      if (reserved + size > capacity) empty_cache();
      TORCH_CHECK_WITH(OutOfMemoryError, reserved + size <= capacity, "simulated: out of memory: ", nbytes,
                       " bytes asked for, ", capacity - reserved, " free");
      Block made = map_block(size);
      reserved += size;
      address = made.address;
      blocks.emplace(address, made);
    }
    Block& block = blocks.at(address);
    block.asked = nbytes, block.owner = current_stream, block.life = ++lives;
    in_use += nbytes;
    most_in_use = std::max(most_in_use, in_use);
    return {address, address, &give_back_block, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back_block; }
  void copy_data(void* target, const void* source, std::size_t nbytes) const override {
    Lock lock(mutex);
    finish(current_stream);
    memcpy(bytes_at(target), bytes_at(source), nbytes);
  }
};
DeviceAllocator allocator;
REGISTER_ALLOCATOR(kDevice, &allocator);

// ------------------------------------------------------------------------------------------ pinned host memory

// What was registered. The pages are held by a second mapping: they outlive the address, as pinned pages do.
struct Pinned {
  char* address;
  size_t nbytes;
  char* pages = nullptr;  // null where the memory does not begin at a page: then the address itself is read
  long copies = 0;        // queued and not done
  ~Pinned() {
    if (pages) munmap(pages, (nbytes + kPage - 1) / kPage * kPage);
  }
};
std::map<char*, std::shared_ptr<Pinned>> pins;
long torn = 0;  // unregistered while a copy from there was queued

// Put a file in memory under the host memory, bytes and all, so that a second mapping can hold the same pages.
// Nobody else may be writing there meanwhile, which is so where memory is registered before it is used.
char* share_pages(char* address, size_t nbytes) {
  size_t size = (nbytes + kPage - 1) / kPage * kPage;
  int file = memfd_create("pinned", MFD_CLOEXEC);
  if (file < 0 || ftruncate(file, size)) return nullptr;
  char* pages = (char*)mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  memcpy(pages, address, size);
  void* same = mmap(address, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0);
  close(file);
  TORCH_CHECK(same == address, "simulated: cannot pin");
  return pages;
}

bool is_mapped(char* address, size_t nbytes) {
  std::vector<unsigned char> there((nbytes + kPage - 1) / kPage + 1);
  char* page = address - (uintptr_t)address % kPage;
  return mincore(page, address + nbytes - page, there.data()) == 0;
}

int register_host(uintptr_t at, size_t nbytes) {
  must_be_usable();
  Lock lock(mutex);
  char* address = (char*)at;
  if (!nbytes || !is_mapped(address, nbytes)) return kInvalidValue;
  for (auto& [start, pinned] : pins)
    if (address < start + pinned->nbytes && start < address + nbytes) return kAlreadyRegistered;
  auto pinned = std::make_shared<Pinned>(Pinned{address, nbytes});
  if (at % kPage == 0) pinned->pages = share_pages(address, nbytes);
  pins.emplace(address, std::move(pinned));
  return 0;
}

int unregister_host(uintptr_t at) {
  must_be_usable();
  Lock lock(mutex);
  auto found = pins.find((char*)at);
  if (found == pins.end()) return kNotRegistered;
  if (found->second->copies) torn++;
  pins.erase(found);
  return 0;
}

std::shared_ptr<Pinned> pinned_at(const void* address) {
  auto found = pins.upper_bound((char*)address);
  if (found == pins.begin()) return nullptr;
  auto& pinned = std::prev(found)->second;
  return (char*)address < pinned->address + pinned->nbytes ? pinned : nullptr;
}

void read_pinned(const Pinned& pinned, char* source, char* target, size_t nbytes) {
  if (pinned.pages) {
    memcpy(target, pinned.pages + (source - pinned.address), nbytes);
    return;
  }
  iovec to{target, nbytes}, from{source, nbytes};  // as memcpy, but what is unmapped is an error and not the end
  TORCH_CHECK(process_vm_readv(getpid(), &to, 1, &from, 1, 0) == (ssize_t)nbytes, "simulated: the source of a copy is gone");
}

// ------------------------------------------------------------------------------------------ guard and hooks

struct EventState {
  MarkPtr mark;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream stream(int64_t id) {
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(kDevice, 0), id);
  }
  c10::DeviceType type() const override { return kDevice; }
  c10::Device exchangeDevice(c10::Device) const override { return {kDevice, 0}; }
  c10::Device getDevice() const override { return {kDevice, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }

  c10::Stream getStream(c10::Device) const override { return stream(current_stream); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(kDefaultStream); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream getNewStream(c10::Device, int) const override {
    must_be_usable();
    Lock lock(mutex);
    return stream(next_stream++);
  }
  c10::Stream exchangeStream(c10::Stream to) const override {
    auto before = current_stream;
    current_stream = to.id();
    return stream(before);
  }
  bool queryStream(const c10::Stream& asked) const override {
    must_be_usable();
    Lock lock(mutex);
    look();
    return queues[asked.id()].empty();
  }
  void synchronizeStream(const c10::Stream& asked) const override {
    must_be_usable();
    Lock lock(mutex);
    finish(asked.id());
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    must_be_usable();
    Lock lock(mutex);
    finish_all();
  }

  void record(void** event, const c10::Stream& on, const c10::DeviceIndex, const c10::EventFlag) const override {
    must_be_usable();
    Lock lock(mutex);
    if (!*event) *event = new EventState;
    ((EventState*)*event)->mark = mark_now(on.id());
    look();
  }
  void block(void* event, const c10::Stream& on) const override {
    must_be_usable();
    Lock lock(mutex);
    if (!event || !((EventState*)event)->mark) return;  // one that was never recorded holds nobody up
    queues[on.id()].push_back({nullptr, ((EventState*)event)->mark, nullptr});
    look();
  }
  bool queryEvent(void* event) const override {
    must_be_usable();
    Lock lock(mutex);
    look();
    return !event || !((EventState*)event)->mark || ((EventState*)event)->mark->passed;
  }
  void synchronizeEvent(void* event) const override {
    must_be_usable();
    Lock lock(mutex);
    if (event && ((EventState*)event)->mark) wait_for(((EventState*)event)->mark);
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete (EventState*)event; }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& user) const override {
    Lock lock(mutex);
    if (data.get()) block_of(data.get()).users.insert(user.id());
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static auto generator = at::make_generator<at::CPUGeneratorImpl>(1);
    return generator;
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<at::CPUGeneratorImpl>(1); }
  bool isPinnedPtr(const void* address) const override {
    Lock lock(mutex);
    return pinned_at(address) != nullptr;
  }
};

// ------------------------------------------------------------------------------------------ copies

long pinned_copies = 0, pageable_copies = 0, pinned_bytes = 0, pageable_bytes = 0;

bool on_device(const at::Tensor& tensor) { return tensor.defined() && tensor.device().type() == kDevice; }

// A tensor of the processor over the bytes of a device tensor. It owns nothing: like a kernel's pointer, it is good
// for as long as nobody else was given the memory.
at::Tensor seen_by_kernels(const at::Tensor& tensor) {
  auto storage = tensor.storage();
  void* bytes = storage.nbytes() ? bytes_at(storage.data()) : nullptr;
  c10::Storage same(c10::Storage::use_byte_size_t(), storage.nbytes(), at::DataPtr(bytes, c10::kCPU));
  auto seen = at::detail::make_tensor<c10::TensorImpl>(std::move(same), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                                       tensor.dtype());
  seen.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.is_conj()) seen._set_conj(true);
  if (tensor.is_neg()) seen._set_neg(true);
  return seen;
}

// What runs inside a task must see neither autograd nor the Python modes of whoever happens to wait for it.
struct Inside {
  at::AutoDispatchBelowADInplaceOrView below;
  c10::impl::ExcludeDispatchKeyGuard no_python{c10::DispatchKeySet(
      {c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot, c10::DispatchKey::PythonDispatcher})};
};

// A copy on a stream that is not the memory's own may find that the memory is no longer what it was queued for.
std::function<void()> watched(const at::Tensor& target, std::function<void()> work) {
  Block& block = block_of(target.storage().data());
  if (block.owner == current_stream) return work;
  char* address = block.address;
  uint64_t life = block.life;
  return [=] {
    auto found = blocks.find(address);
    if (found == blocks.end() || found->second.life != life) strays++;
    work();
  };
}

void copy_to_device(const at::Tensor& source, const at::Tensor& target, bool non_blocking) {
  bool plain = source.dtype() == target.dtype() && source.is_contiguous() && target.is_contiguous() &&
               !source.is_conj() && !source.is_neg() && !target.is_conj() && !target.is_neg();
  auto pinned = plain && non_blocking ? pinned_at(source.data_ptr()) : nullptr;
  size_t nbytes = source.nbytes();
  if (pinned) {
    char *from = (char*)source.data_ptr(), *to = bytes_at(target.data_ptr());
    TORCH_CHECK(from + nbytes <= pinned->address + pinned->nbytes,
                "simulated: invalid argument: a copy reaches beyond the registered range that it begins in");
    pinned_copies++, pinned_bytes += nbytes, pinned->copies++;
    enqueue(watched(target, [=] {
      pinned->copies--;
      read_pinned(*pinned, from, to, nbytes);
    }));
    return;
  }
  if (non_blocking) pageable_copies++, pageable_bytes += nbytes;
  at::Tensor taken, to = seen_by_kernels(target);
  {
    Inside inside;
    taken = source.clone();  // the driver takes the bytes before the call comes back
  }
  enqueue(watched(target, [=] {
    Inside inside;
    to.copy_(taken);
  }));
  if (!non_blocking) finish(current_stream);
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& target, bool non_blocking) {
  must_be_usable();
  Lock lock(mutex);
  if (!self.numel()) return target;
  if (!on_device(self)) {
    copy_to_device(self, target, non_blocking);
  } else if (on_device(target)) {
    at::Tensor from = seen_by_kernels(self), to = seen_by_kernels(target);
    enqueue(watched(target, [=] {
      Inside inside;
      to.copy_(from);
    }));
  } else {
    finish(current_stream);
    Inside inside;
    at::Tensor(target).copy_(seen_by_kernels(self));
  }
  return target;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& target) {
  if (target.sizes() != self.sizes()) target.resize_(self.sizes());
  return copy_from(self, target, false);
}

// ------------------------------------------------------------------------------------------ kernels

// Every tensor and device within arguments, by another.
c10::IValue replaced(const c10::IValue& value, const std::function<at::Tensor(const at::Tensor&)>& by, c10::Device device) {
  if (value.isTensor()) return on_device(value.toTensor()) ? c10::IValue(by(value.toTensor())) : value;
  if (value.isDevice()) return value.toDevice().type() == kDevice ? c10::IValue(device) : value;
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& each : value.toTensorVector()) list.push_back(on_device(each) ? by(each) : each);
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (std::optional<at::Tensor> each : value.toOptionalTensorList())
      list.push_back(each && on_device(*each) ? std::optional<at::Tensor>(by(*each)) : each);
    return list;
  }
  return value;
}

// Whether an operation's results have a shape that follows from its arguments' shapes, and no result is a number.
bool may_be_late(const c10::OperatorHandle& op) {
  for (auto tag : {at::Tag::data_dependent_output, at::Tag::dynamic_output_shape, at::Tag::nondeterministic_seeded})
    if (op.hasTag(tag)) return false;
  for (const auto& result : op.schema().returns()) {
    bool fresh_or_written = !result.alias_info() || result.alias_info()->isWrite();
    if (result.type()->kind() != c10::TypeKind::TensorType || !fresh_or_written) return false;
  }
  return true;
}

long late_kernels = 0, early_kernels = 0;
std::map<std::string, long> early_names;  // operations that were not late

// Run the operation on tensors without data: it gives the results' shapes. False where torch does not know them.
bool results_without_data(const c10::OperatorHandle& op, const std::vector<c10::IValue>& arguments, torch::jit::Stack& results) {
  auto empty = [](const at::Tensor& each) {
    return at::detail::empty_strided_meta(each.sizes(), each.strides(), each.scalar_type());
  };
  results.clear();
  for (const auto& each : arguments) results.push_back(replaced(each, empty, c10::Device(c10::kMeta)));
  const auto& schema = op.schema();
  auto before = results;
  try {
    at::AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(&results);
  } catch (const c10::Error&) {
    return false;
  } catch (const std::exception&) {
    return false;
  }
  for (size_t i = 0; i < arguments.size(); i++) {  // an out= that is to be resized
    const auto* alias = schema.arguments()[i].alias_info();
    if (!alias || !alias->isWrite() || !arguments[i].isTensor() || !on_device(arguments[i].toTensor())) continue;
    auto sizes = before[i].toTensor().sizes();
    if (arguments[i].toTensor().sizes() != sizes) arguments[i].toTensor().resize_(sizes);
  }
  return true;
}

// The argument that a written result is.
at::Tensor written(const c10::FunctionSchema& schema, const c10::Argument& result, const std::vector<c10::IValue>& arguments) {
  for (size_t i = 0; i < arguments.size(); i++) {
    const auto* alias = schema.arguments()[i].alias_info();
    if (alias && alias->isWrite() && alias->beforeSets() == result.alias_info()->beforeSets()) return arguments[i].toTensor();
  }
  TORCH_CHECK(false, "simulated: ", schema.name(), " gives something written that is none of its arguments");
}

bool compute_late(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  if (!may_be_late(op)) return false;
  const auto& schema = op.schema();
  size_t count = schema.arguments().size();
  std::vector<c10::IValue> arguments(stack->end() - count, stack->end());
  torch::jit::Stack shapes;
  if (!results_without_data(op, arguments, shapes)) return false;  // outside the lock: it may need Python's

  Lock lock(mutex);
  std::vector<at::Tensor> results;
  std::vector<std::pair<size_t, at::Tensor>> fresh;  // results that were made here, as kernels see them
  for (size_t i = 0; i < schema.returns().size(); i++) {
    const auto& result = schema.returns()[i];
    at::Tensor shape = shapes[i].toTensor();
    if (result.alias_info()) {
      results.push_back(written(schema, result, arguments));
    } else if (!shape.defined()) {
      results.push_back(shape);
    } else {
      results.push_back(at::empty_strided(shape.sizes(), shape.strides(), shape.options().device(c10::Device(kDevice, 0))));
      if (results.back().numel()) fresh.emplace_back(i, seen_by_kernels(results.back()));
    }
  }
  torch::jit::Stack seen;
  for (const auto& each : arguments) seen.push_back(replaced(each, seen_by_kernels, c10::Device(c10::kCPU)));
  enqueue([op, seen, fresh] {
    Inside inside;
    torch::jit::Stack computed = seen;
    op.callBoxed(&computed);
    for (const auto& [i, target] : fresh) at::Tensor(target).copy_(computed[i].toTensor());
  });
  torch::jit::drop(*stack, count);
  for (auto& each : results) stack->emplace_back(std::move(each));
  late_kernels++;
  return true;
}

void kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  must_be_usable();
  if (compute_late(op, stack)) return;
  {
    Lock lock(mutex);
    finish(current_stream);
    early_kernels++;
    early_names[op.schema().name()]++;
  }
  at::native::cpu_fallback(op, stack);
}

at::Tensor empty(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                 std::optional<c10::Device>, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype,
                         std::optional<c10::Layout>, std::optional<c10::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

at::Tensor as_strided(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                           offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt);
}

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) { return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size)); }

at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

const at::Tensor& resize_(const at::Tensor& self, c10::SymIntArrayRef sizes, std::optional<c10::MemoryFormat>) {
  auto size = C10_AS_INTARRAYREF_SLOW(sizes);
  int64_t count = 1;
  for (auto each : size) count *= each;
  size_t needed = (count + self.storage_offset()) * self.dtype().itemsize();
  auto storage = self.storage();
  if (needed > storage.nbytes()) {
    auto grown = allocator.allocate(needed);
    if (storage.nbytes()) allocator.copy_data(grown.get(), storage.data(), storage.nbytes());
    storage.set_data_ptr_noswap(std::move(grown));
    storage.set_nbytes(needed);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

// torch asks devices of this kind for convolutions as a whole.
at::Tensor convolution(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       at::SymIntArrayRef stride, at::SymIntArrayRef padding, at::SymIntArrayRef dilation, bool transposed,
                       at::SymIntArrayRef output_padding, c10::SymInt groups) {
  std::optional<at::Tensor> added;
  if (bias && bias->defined()) added = bias->cpu();
  return at::convolution_symint(input.cpu(), weight.cpu(), added, stride, padding, dilation, transposed, output_padding, groups)
      .to(input.device());
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&kernel>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("as_strided", &as_strided);
  library.impl("view", &view);
  library.impl("_reshape_alias", &reshape_alias);
  library.impl("unfold", [](const at::Tensor& self, int64_t dim, int64_t size, int64_t step) {
    return at::native::unfold(self, dim, size, step);
  });
  library.impl("view_as_real", [](const at::Tensor& self) { return at::native::view_as_real(self); });
  library.impl("view_as_complex", [](const at::Tensor& self) { return at::native::view_as_complex(self); });
  library.impl("resize_", &resize_);
  library.impl("record_stream", [](at::Tensor& self, c10::Stream user) {
    Guard().recordDataPtrOnStream(self.storage().data_ptr(), user);
  });
  library.impl("convolution_overrideable", &convolution);
}

long pending_tasks() {
  Lock lock(mutex);
  long count = 0;
  for (auto& [stream, queue] : queues) count += queue.size();
  return count;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
  using Free = pybind11::call_guard<pybind11::gil_scoped_release>;  // a task may need Python while another thread has it
  module.def("set_schedule", [](double copies, double computes, int seed) {
    Lock lock(mutex);
    copies_eager = copies, computes_eager = computes;
    chance.seed(seed);
  }, Free());
  module.def("set_capacity", [](size_t nbytes) { capacity = nbytes; });
  module.def("register_host", &register_host, Free());
  module.def("unregister_host", &unregister_host, Free());
  module.def("pins", [] {
    Lock lock(mutex);
    std::vector<std::pair<uintptr_t, size_t>> all;
    for (auto& [address, pinned] : pins) all.emplace_back((uintptr_t)address, pinned->nbytes);
    return all;
  }, Free());
  module.def("drop_pins", [] {
    Lock lock(mutex);
    pins.clear();
  }, Free());
  module.def("pending", &pending_tasks, Free());
  module.def("pending_copies", [] {  // work on streams other than the default one; events alone hold nothing up
    Lock lock(mutex);
    long count = 0;
    for (auto& [stream, queue] : queues)
      for (auto& task : queue) count += stream != kDefaultStream && task.work;
    return count;
  }, Free());
  module.def("finish", [] {
    must_be_usable();
    Lock lock(mutex);
    finish_all();
    retire_what_is_past();
  }, Free());
  module.def("empty_cache", [] {
    Lock lock(mutex);
    empty_cache();
  }, Free());
  module.def("memory", [] {
    Lock lock(mutex);
    return std::map<std::string, size_t>{{"in_use", in_use}, {"most_in_use", most_in_use}, {"reserved", reserved}, {"capacity", capacity}};
  }, Free());
  module.def("reset_counts", [] {
    Lock lock(mutex);
    most_in_use = in_use;
    strays = torn = pinned_copies = pageable_copies = pinned_bytes = pageable_bytes = late_kernels = early_kernels = 0;
    early_names.clear();
  }, Free());
  module.def("counts", [] {
    Lock lock(mutex);
    return std::map<std::string, long>{
        {"strays", strays}, {"torn", torn}, {"pinned_copies", pinned_copies}, {"pageable_copies", pageable_copies},
        {"pinned_bytes", pinned_bytes}, {"pageable_bytes", pageable_bytes}, {"late_kernels", late_kernels},
        {"early_kernels", early_kernels}};
  }, Free());
  module.def("early_names", [] { return early_names; });
}
