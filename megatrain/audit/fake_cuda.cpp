// A CUDA device without a card: enough of a device guard and of CUDA's hooks that a CPU build of torch lets autograd,
// streams and events name "cuda". Nothing is computed: tensors live under FakeTensorMode. Host waits are counted.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <atomic>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

constexpr DeviceIndex kCards = 8;

std::atomic<int64_t> waits_of_host{0};
std::atomic<int64_t> next_stream{1};
thread_local DeviceIndex current_card = 0;
thread_local c10::StreamId current_stream = 0;

Device card(DeviceIndex index) { return Device(DeviceType::CUDA, index < 0 ? current_card : index); }

Stream stream_on(Device device, c10::StreamId id) { return Stream(Stream::UNSAFE, card(device.index()), id); }

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  DeviceIndex deviceCount() const noexcept override { return kCards; }
  Device getDevice() const override { return card(-1); }
  void setDevice(Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.index() >= 0) current_card = device.index();
  }
  Device exchangeDevice(Device device) const override {
    const Device before = getDevice();
    setDevice(device);
    return before;
  }

  Stream getStream(Device device) const override { return stream_on(device, current_stream); }
  Stream getDefaultStream(Device device) const override { return stream_on(device, 0); }
  Stream getStreamFromGlobalPool(Device device, bool) const override { return stream_on(device, next_stream++); }
  Stream getNewStream(Device device, int) const override { return stream_on(device, next_stream++); }
  Stream exchangeStream(Stream stream) const override {
    const Stream before = stream_on(stream.device(), current_stream);
    current_stream = stream.id();
    return before;
  }

  // An event is one byte: it has an address, and nothing else is asked of it.
  void record(void** event, const Stream&, const DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) *event = new char;
  }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override { delete static_cast<char*>(event); }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const Stream&) const override { return true; }
  double elapsedTime(void*, void*, const DeviceIndex) const override { return 1.0; }

  void synchronizeEvent(void*) const override { ++waits_of_host; }
  void synchronizeStream(const Stream&) const override { ++waits_of_host; }
  void synchronizeDevice(const DeviceIndex) const override { ++waits_of_host; }
};

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isPinnedPtr(const void*) const override { return false; }
  int getNumGPUs() const override { return kCards; }
  DeviceIndex deviceCount() const override { return kCards; }
  DeviceIndex current_device() const override { return current_card; }
  DeviceIndex getCurrentDevice() const override { return current_card; }
  void setCurrentDevice(DeviceIndex index) const override { current_card = index; }
  DeviceIndex exchangeDevice(DeviceIndex index) const override {
    const DeviceIndex before = current_card;
    current_card = index;
    return before;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override { return exchangeDevice(index); }
  void deviceSynchronize(DeviceIndex) const override { ++waits_of_host; }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    static const at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(0);
    return generator;
  }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::make_generator<at::CPUGeneratorImpl>(0); }
};

}  // namespace

extern "C" int64_t host_waits() { return waits_of_host; }

extern "C" void install() {
  at::CUDAHooksRegistry()->Register("CUDAHooks", [](at::CUDAHooksArgs) -> std::unique_ptr<at::CUDAHooksInterface> {
    return std::make_unique<Hooks>();
  });
  c10::impl::registerDeviceGuard(DeviceType::CUDA, new Guard());
}
