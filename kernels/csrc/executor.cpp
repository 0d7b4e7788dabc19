// Replays recorded operator calls without Python, through the programs of program.cpp, which stands
// in front of this file. One boxed kernel serves all operators.
//
// A call's *form* is everything that the Python implementation may look at: sizes, strides, dtypes,
// devices, numbers, strings, which pointers are multiples of 16, and where operands lie in storages
// that they share. Calls of equal forms do the same steps on other addresses. The first call of a
// form runs in Python, the second is recorded there, all later ones are replayed here.

namespace {

using Words = c10::SmallVector<int64_t, 160>;

// --- forms --------------------------------------------------------------------------------------

thread_local int64_t context = 0;

void describe_tensor(const at::Tensor& tensor, Words& form, Tensors& tensors) {
  const auto address = reinterpret_cast<intptr_t>(tensor.const_data_ptr());
  form.push_back(
      1 | tensor.dim() << 8 | static_cast<int64_t>(tensor.scalar_type()) << 24 |
      static_cast<int64_t>(tensor.get_device() + 1) << 32 | int64_t{address % 16 == 0} << 48);
  for (auto size : tensor.sizes()) form.push_back(size);
  for (auto stride : tensor.strides()) form.push_back(stride);
  // views of one storage: Python may find one operand in another's memory
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i]->storage().unsafeGetStorageImpl() == tensor.storage().unsafeGetStorageImpl()) {
      form.push_back(i + 1);
      form.push_back(address - reinterpret_cast<intptr_t>(tensors[i]->const_data_ptr()));
      break;
    }
  }
  form.push_back(-1);
  tensors.push_back(&tensor);
}

// The form of a call, and its tensors in order; false for what no program can be made for.
bool describe(c10::ArrayRef<IValue> arguments, Words& form, Tensors& tensors) {
  for (const auto& argument : arguments) {
    if (argument.isTensor()) {
      describe_tensor(argument.toTensor(), form, tensors);
    } else if (argument.isNone()) {
      form.push_back(2);
    } else if (argument.isInt()) {
      form.push_back(3), form.push_back(argument.toInt());
    } else if (argument.isBool()) {
      form.push_back(4), form.push_back(argument.toBool());
    } else if (argument.isDouble()) {
      form.push_back(5), form.push_back(bits<int64_t>(argument.toDouble()));
    } else if (argument.isString()) {
      const auto text = argument.toStringView();
      form.push_back(6), form.push_back(text.size());
      for (size_t i = 0; i < text.size(); i += 8) {
        int64_t word = 0;
        std::memcpy(&word, text.data() + i, std::min<size_t>(8, text.size() - i));
        form.push_back(word);
      }
    } else if (argument.isList()) {
      const auto parts = argument.toListRef();
      form.push_back(7), form.push_back(parts.size());
      if (!describe(parts, form, tensors)) return false;
      // Python may take neighbours in memory as one tensor, if the first one's storage holds all
      intptr_t end = 0;
      size_t bytes = 0;
      const at::Tensor* first = nullptr;
      for (const auto& part : parts) {
        if (!part.isTensor()) continue;
        const auto& tensor = part.toTensor();
        const auto begin = reinterpret_cast<intptr_t>(tensor.const_data_ptr());
        form.push_back(begin == end);
        bytes += tensor.nbytes(), end = begin + tensor.nbytes();
        if (!first) first = &tensor;
      }
      if (first)
        form.push_back(
            first->storage_offset() * first->itemsize() + bytes <= first->storage().nbytes());
    } else {
      return false;
    }
  }
  return true;
}

uint64_t hash(c10::ArrayRef<int64_t> words) {
  uint64_t h = words.size();
  for (auto word : words) {
    h = (h ^ static_cast<uint64_t>(word)) * 0x9E3779B97F4A7C15ull;
    h ^= h >> 32;
  }
  return h;
}

struct Entry {
  std::vector<int64_t> form;
  std::shared_ptr<const Program> program;  // null until recorded
  bool refused = false;                    // cannot be recorded
};

constexpr size_t kMostForms = 8192;
std::shared_mutex entries_mutex;
std::unordered_multimap<uint64_t, Entry> entries;
std::atomic<int64_t> replays{0};

Entry* find(uint64_t key, c10::ArrayRef<int64_t> form) {
  auto [first, last] = entries.equal_range(key);
  for (; first != last; ++first)
    if (c10::ArrayRef<int64_t>(first->second.form) == form) return &first->second;
  return nullptr;
}

// The form that Python may record, of the call in progress on this thread.
thread_local bool wanted = false;
thread_local std::vector<int64_t> wanted_form;

// --- operators -------------------------------------------------------------------------------------

bool requires_grad(const Tensors& tensors) {
  for (const auto* tensor : tensors)
    if (tensor->requires_grad()) return true;
  return false;
}

// ss1::<name> at a device's key; `fallback` has the Python implementation at that key.
struct Executor final : c10::OperatorKernel {
  const c10::OperatorHandle fallback;
  const Driver& driver;
  Executor(c10::OperatorHandle fallback, const Driver& driver)
      : fallback(fallback), driver(driver) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
    const auto count = op.schema().arguments().size();
    const auto arguments = c10::ArrayRef<IValue>(*stack).slice(stack->size() - count);
    Words form{reinterpret_cast<int64_t>(this), context};
    Tensors tensors;
    const bool known = describe(arguments, form, tensors) && !tensors.empty();
    const bool refuses = c10::GradMode::is_enabled() && requires_grad(tensors);
    at::AutoDispatchBelowADInplaceOrView guard;
    wanted = false;
    if (!known || refuses) return fallback.callBoxed(stack);

    const auto key = hash(form);
    std::shared_ptr<const Program> program;
    {
      std::shared_lock lock(entries_mutex);
      if (const auto* entry = find(key, form)) {
        program = entry->program;
        wanted = !program && !entry->refused;
      } else {
        lock.unlock();
        std::unique_lock exclusive(entries_mutex);
        if (entries.size() >= kMostForms) entries.clear();
        entries.emplace(key, Entry{{form.begin(), form.end()}, nullptr});
      }
    }
    if (!program) {
      if (wanted) wanted_form.assign(form.begin(), form.end());
      return fallback.callBoxed(stack);
    }
    const auto device = tensors[0]->device();
    c10::OptionalDeviceGuard device_guard;
    if (device.is_cuda()) device_guard.reset_device(device);
    Replay replay{driver, *program, tensors, device};
    for (const auto& step : program->steps) std::visit(replay, step);
    stack->erase(stack->end() - count, stack->end());
    replay.finish(*stack);
    replays.fetch_add(1, std::memory_order_relaxed);
  }
};

// At a device's autograd key: where nothing needs a gradient, past the Python kernel for it.
struct Gate final : c10::OperatorKernel {
  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    if (c10::GradMode::is_enabled()) {
      for (const auto& argument : torch::jit::last(*stack, op.schema().arguments().size()))
        if (argument.isTensor() && argument.toTensor().requires_grad())
          return op.callBoxedForDispatchKey(c10::DispatchKey::Autograd, *stack);
    }
    at::AutoDispatchBelowAutograd guard;
    op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
  }
};

// Replacing a Python kernel is meant; PyTorch warns of it.
struct Silence final : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

thread_local std::string error;

template <class F>
const char* guarded(F&& f) {
  try {
    f();
    return nullptr;
  } catch (const std::exception& failure) {
    error = failure.what();
    return error.c_str();
  }
}

c10::OperatorHandle operator_of(const char* name, const char* overload) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload);
}

void replace(const char* name, c10::DispatchKey key, c10::KernelFunction kernel) {
  static Silence silence;
  c10::WarningUtils::WarningHandlerGuard guard(&silence);
  static auto* kept = new std::vector<c10::RegistrationHandleRAII>();
  kept->push_back(c10::Dispatcher::singleton().registerImpl(
      c10::OperatorName(name, ""), key, std::move(kernel), std::nullopt, nullptr, "ss1_compile"));
}

}  // namespace

// --- for Python ---------------------------------------------------------------------------------
// What returns text returns null where it went well.

extern "C" {

// The driver's functions, kept for good.
const void* ss1_driver(void* launch, void* replace_address, void* stream, void* retain, void* set) {
  auto* driver = new Driver();
  driver->launch = reinterpret_cast<decltype(driver->launch)>(launch);
  driver->replace_address = reinterpret_cast<decltype(driver->replace_address)>(replace_address);
  driver->stream = reinterpret_cast<decltype(driver->stream)>(stream);
  driver->retain_context = reinterpret_cast<decltype(driver->retain_context)>(retain);
  driver->set_context = reinterpret_cast<decltype(driver->set_context)>(set);
  return driver;
}

const char* ss1_execute(
    const char* name, const char* fallback, const char* key, const void* driver) {
  return guarded([&] {
    auto executor = std::make_unique<Executor>(
        operator_of(fallback, ""), *static_cast<const Driver*>(driver));
    replace(
        name,
        c10::parseDispatchKey(key),
        c10::KernelFunction::makeFromBoxedFunctor(std::move(executor)));
  });
}

const char* ss1_gate(const char* name, const char* key) {
  return guarded([&] {
    replace(
        name,
        c10::parseDispatchKey(key),
        c10::KernelFunction::makeFromBoxedFunctor(std::make_unique<Gate>()));
  });
}

// The number by which programs call an operator, or -1.
int64_t ss1_operator(const char* name, const char* overload) {
  static std::mutex mutex;
  int64_t index = -1;
  guarded([&] {
    const auto found = operator_of(name, overload);
    std::lock_guard lock(mutex);
    auto& all = operators();
    if (all.capacity() == 0) all.reserve(1024);  // calls point into it
    const auto at = std::find(all.begin(), all.end(), found);
    if (at == all.end() && all.size() == all.capacity()) return;
    if (at == all.end()) all.push_back(found);
    index = std::find(all.begin(), all.end(), found) - all.begin();
  });
  return index;
}

// Whether the call in progress on this thread is to be recorded; asking is taking it up.
int ss1_wanted() {
  const bool taken = wanted;
  wanted = false;
  return taken;
}

const char* ss1_publish(const int64_t* words, int64_t count) {
  return guarded([&] {
    Reader reader{words, words + count};
    auto program = count ? std::make_shared<const Program>(reader.program()) : nullptr;
    std::unique_lock lock(entries_mutex);
    if (auto* entry = find(hash(wanted_form), wanted_form)) {
      entry->refused = !program;
      entry->program = std::move(program);
    }
  });
}

void ss1_context(int64_t value) { context = value; }

int64_t ss1_replays() { return replays.load(std::memory_order_relaxed); }

void ss1_clear() {
  std::unique_lock lock(entries_mutex);
  entries.clear();
}

}  // extern "C"
