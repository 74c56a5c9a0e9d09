// The C interface of moba.py, attention, of newton_schulz.py and of muon.py. The mathematics and
// the plan are in forward.h, newton_schulz.h and muon.h.
#include "backward.h"
#include "decode.h"
#include "muon.h"
#include "newton_schulz.h"

extern "C" {

// 1 if bfloat16 operands are multiplied as they are; otherwise the caller passes float32.
int64_t moonfx_bfloat16(void) {
#ifdef MOONFX_BF16
    return 1;
#else
    return 0;
#endif
}

// All return the bytes of scratch that they used, or -1 if it could not be allocated.
int64_t moonfx_forward(const Arguments* a, int64_t bfloat16) {
    Plan plan(*a);
    bool few = a->Nq * plan.G <= FEW;
#ifdef MOONFX_BF16
    if (bfloat16) return few ? Decode<bf16>{plan, *a}.run() : Forward<BFloat16>{plan, *a}.run();
#endif
    (void)bfloat16;
    return few ? Decode<float>{plan, *a}.run() : Forward<Float32>{plan, *a}.run();
}

int64_t moonfx_backward(const Arguments* a, int64_t bfloat16) {
    Plan plan(*a);
#ifdef MOONFX_BF16
    if (bfloat16) return Backward<BFloat16>(plan).run();
#endif
    (void)bfloat16;
    return Backward<Float32>(plan).run();
}

int64_t moonfx_newton_schulz(const NewtonSchulzArguments* a, int64_t bfloat16) {
#ifdef MOONFX_BF16
    if (bfloat16) return NewtonSchulz<BFloat16>{*a}.run();
#endif
    (void)bfloat16;
    return NewtonSchulz<Float32>{*a}.run();
}

void moonfx_muon_gather(const MuonArguments* a, int64_t bfloat16) {
    bfloat16 ? MuonMatrix<bf16>{*a}.gather() : MuonMatrix<float>{*a}.gather();
}

void moonfx_muon_scatter(const MuonArguments* a, int64_t bfloat16) {
    bfloat16 ? MuonMatrix<bf16>{*a}.scatter() : MuonMatrix<float>{*a}.scatter();
}
}
