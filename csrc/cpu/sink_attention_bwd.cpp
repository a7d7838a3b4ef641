// Backward of the CPU operator sink_attention.
#include "common/check.h"
#include "cpu/common.h"
#include "cpu/sink_attention.h"

namespace recattn {

template <class T>
void sink_backward(const SinkAttention<T>&) {
    expect(false, "sink_attention_cpu_bwd is not implemented yet");
}

template void sink_backward(const SinkAttention<float>&);
template void sink_backward(const SinkAttention<BFloat16>&);
template void sink_backward(const SinkAttention<Half>&);

}  // namespace recattn
