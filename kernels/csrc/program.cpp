// Programs: what kernels/program.py recorded of a call in Python, read and done again.
//
// A program's slots are the call's tensors: first the operands, then what its steps make. Included
// in front of executor.cpp.
//
// No CUDA header is needed: the driver's functions are passed in, and two of its structs declared.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <variant>
#include <vector>

namespace {

using c10::IValue;
using torch::jit::Stack;
using Tensors = c10::SmallVector<const at::Tensor*, 16>;
using Made = c10::SmallVector<at::Tensor, 8>;

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// --- the driver ---------------------------------------------------------------------------------

// CUlaunchAttribute and CUlaunchConfig of cuda.h
struct Attribute {
  int id;
  char pad[4];
  union {
    int flag;
    char bytes[64];
  } value;
};
struct Config {
  unsigned grid[3], block[3], shared_bytes;
  void* stream;
  Attribute* attributes;
  unsigned count;
};
static_assert(sizeof(Attribute) == 72 && sizeof(Config) == 56);

constexpr int kProgrammaticStreamSerialization = 6;
constexpr int kInvalidContext = 201;

struct Driver {
  int (*launch)(const Config*, void* function, void** parameters, void** extra);
  int (*replace_address)(void* tensor_map, void* address);
  int (*stream)(int32_t device, void** stream);
  int (*retain_context)(void** context, int device);
  int (*set_context)(void* context);
};

// --- programs -----------------------------------------------------------------------------------

using TensorMap = std::array<uint64_t, 16>;
constexpr size_t kMostMaps = 4;

struct View {
  int64_t slot, offset;  // in elements, from where the slot's tensor begins
  std::vector<int64_t> sizes, strides;
};

struct Allocate {
  c10::ScalarType dtype;
  bool contiguous;
  std::vector<int64_t> sizes, strides;
};

struct Patch {
  int64_t position, slot, offset;  // in bytes
  bool map;
  TensorMap value;
};

struct Launch {
  Config config;
  bool dependent;  // programmatic dependent launch
  void* function;
  std::vector<int64_t> values;  // parameters that never change; zero where patched
  std::vector<Patch> patches;
};

struct Default {};

struct Call {
  const c10::OperatorHandle* op;
  bool keeps;  // the result becomes a slot
  std::vector<std::variant<IValue, View, Default>> arguments;
};

struct Program {
  std::vector<std::variant<Allocate, Launch, Call>> steps;
  std::vector<View> outputs;
  size_t inputs;
};

// Reads what program.py wrote.
struct Reader {
  const int64_t* at;
  const int64_t* end;

  int64_t next() {
    if (at == end) throw std::runtime_error("the program ends early");
    return *at++;
  }
  std::vector<int64_t> list() {
    std::vector<int64_t> values(next());
    for (auto& value : values) value = next();
    return values;
  }
  View view() {
    View found;
    found.slot = next(), found.offset = next(), found.sizes = list(), found.strides = list();
    return found;
  }
  Allocate allocate() {
    Allocate step;
    step.dtype = static_cast<c10::ScalarType>(next()), step.contiguous = next();
    step.sizes = list(), step.strides = list();
    return step;
  }
  Launch launch() {
    Launch step{};
    step.function = reinterpret_cast<void*>(next());
    for (auto& size : step.config.grid) size = next();
    step.config.block[0] = next(), step.config.block[1] = step.config.block[2] = 1;
    step.config.shared_bytes = next(), step.dependent = next();
    step.values = list();
    step.patches.resize(next());
    size_t maps = 0;
    for (auto& patch : step.patches) {
      patch.position = next(), patch.slot = next(), patch.offset = next(), patch.map = next();
      if (!patch.map) continue;
      if (++maps > kMostMaps) throw std::runtime_error("too many TMA descriptors");
      for (auto& word : patch.value) word = next();
    }
    return step;
  }
  Call call();
  Program program();
};

std::vector<c10::OperatorHandle>& operators() {
  static auto* all = new std::vector<c10::OperatorHandle>();
  return *all;
}

Call Reader::call() {
  Call step;
  step.op = &operators().at(next()), step.keeps = next();
  step.arguments.resize(next());
  for (auto& argument : step.arguments) {
    switch (next()) {
      case 0: argument = Default{}; break;
      case 1: argument = IValue(); break;
      case 2: argument = view(); break;
      case 3: argument = IValue(next()); break;
      case 4: argument = IValue(bits<double>(next())); break;
      case 5: argument = IValue(next() != 0); break;
      case 6: argument = IValue(list()); break;
      default: throw std::runtime_error("unknown kind of argument");
    }
  }
  return step;
}

Program Reader::program() {
  Program found;
  found.inputs = next();
  for (auto count = next(); count; --count) {
    switch (next()) {
      case 0: found.steps.emplace_back(allocate()); break;
      case 1: found.steps.emplace_back(launch()); break;
      case 2: found.steps.emplace_back(call()); break;
      default: throw std::runtime_error("unknown kind of step");
    }
  }
  found.outputs.resize(next());
  for (auto& output : found.outputs) output = view();
  return found;
}

// --- replay -------------------------------------------------------------------------------------

at::Tensor view_of(const at::Tensor& base, const View& view) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(base.storage()), base.key_set(), base.dtype());
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_storage_offset(base.storage_offset() + view.offset);
  impl->set_sizes_and_strides(view.sizes, view.strides);
  return tensor;
}

struct Replay {
  const Driver& driver;
  const Program& program;
  const Tensors& inputs;
  const c10::Device device;
  void* stream = nullptr;
  bool has_stream = false;
  Made made{};

  const at::Tensor& slot(int64_t index) const {
    const auto inputs_count = static_cast<int64_t>(program.inputs);
    return index < inputs_count ? *inputs[index] : made[index - inputs_count];
  }

  void operator()(const Allocate& step) {
    const auto options = at::TensorOptions(step.dtype).device(device);
    made.push_back(
        step.contiguous ? at::empty(step.sizes, options)
                        : at::empty_strided(step.sizes, step.strides, options));
  }

  void operator()(const Launch& step) {
    if (!has_stream) {
      TORCH_CHECK(!driver.stream(device.index(), &stream), "ss1: no current stream");
      has_stream = true;
    }
    c10::SmallVector<void*, 48> parameters;
    for (const auto& value : step.values) parameters.push_back(const_cast<int64_t*>(&value));
    c10::SmallVector<char*, 24> addresses(step.patches.size());
    alignas(64) TensorMap maps[kMostMaps];
    size_t used = 0;
    for (size_t i = 0; i < step.patches.size(); ++i) {
      const auto& patch = step.patches[i];
      addresses[i] = static_cast<char*>(slot(patch.slot).mutable_data_ptr()) + patch.offset;
      parameters[patch.position] = &addresses[i];
      if (patch.map) {
        auto& map = maps[used++];
        map = patch.value;
        TORCH_CHECK(!driver.replace_address(&map, addresses[i]), "ss1: no TMA descriptor");
        parameters[patch.position] = &map;
      }
    }
    auto config = step.config;
    Attribute attribute{kProgrammaticStreamSerialization, {}, {1}};
    config.stream = stream, config.attributes = &attribute, config.count = step.dependent;
    auto result = driver.launch(&config, step.function, parameters.data(), nullptr);
    if (result == kInvalidContext) {  // a thread in which CUDA's runtime was not used yet
      void* current = nullptr;
      TORCH_CHECK(!driver.retain_context(&current, device.index()), "ss1: no CUDA context");
      driver.set_context(current);
      result = driver.launch(&config, step.function, parameters.data(), nullptr);
    }
    // Not TORCH_CHECK, which formats numbers with a stream: where the toolchain links its own
    // libstdc++ into this library, the streams of two meet, and the process dies.
    if (result)
      throw std::runtime_error(
          "ss1: a kernel launch failed with CUDA driver error " + std::to_string(result));
  }

  void operator()(const Call& step) {
    Stack stack;
    const auto& schema = step.op->schema().arguments();
    stack.reserve(step.arguments.size());
    for (size_t i = 0; i < step.arguments.size(); ++i) {
      const auto& argument = step.arguments[i];
      if (const auto* view = std::get_if<View>(&argument)) {
        stack.emplace_back(view_of(slot(view->slot), *view));
      } else if (const auto* value = std::get_if<IValue>(&argument)) {
        stack.push_back(*value);
      } else {
        stack.push_back(schema[i].default_value().value());
      }
    }
    step.op->callBoxed(stack);
    if (step.keeps) made.push_back(stack.back().toTensor());
  }

  void finish(Stack& stack) {
    for (const auto& output : program.outputs) {
      auto& tensor = made[output.slot - program.inputs];
      if (tensor.sizes() != output.sizes || tensor.strides() != output.strides)
        tensor.unsafeGetTensorImpl()->set_sizes_and_strides(output.sizes, output.strides);
      stack.emplace_back(std::move(tensor));
    }
  }
};

}  // namespace
