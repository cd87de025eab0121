#!/usr/bin/env bash
# ptxas 13.5.37 (nvidia-cuda-nvcc), sm_90a: a barrier between the blocks of a cluster, with its scope spelled out, waits for
# the whole device and empties the first-level cache.
#
# Where two blocks share what the tensor memory accelerator brings, one tells the other by `mbarrier.arrive` at a barrier in the
# other's memory. By default both sides have the semantics of release and acquire in the scope of the block. The scope
# that the situation calls for is the cluster's, so we wrote `.release.cluster` and `.acquire.cluster`. The arrival
# becomes fences of the whole device, which wait for every store that the thread has made to global memory, and each wait is
# followed by an invalidation of the cache. In a product of matrices on an H200 that cost an eighth of the time.
# Without the words neither is there.
#
# Needs: a Python with pip. Seen:
#   plain: MEMBAR 0, CCTL.IVALL 0
#   .release.cluster and .acquire.cluster: MEMBAR 2, CCTL.IVALL 2
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python -m pip install -q --target "$folder/packages" --no-deps nvidia-cuda-nvcc==13.5.37 nvidia-cuda-nvdisasm==13.5.37
ptxas=$(find "$folder/packages" -name ptxas -type f)
nvdisasm=$(find "$folder/packages" -name nvdisasm -type f)

compiled() { # words of the arrival, words of the wait: the instructions
    cat > "$folder/one.ptx" <<PTX
.version 8.6
.target sm_90a
.address_size 64
.visible .entry one(.param .u64 to) .reqnctapercluster 2, 1, 1 {
    .shared .align 8 .b64 barrier;
    .reg .b64 p;
    .reg .b32 near, far, other;
    .reg .pred done;
    ld.param.u64 p, [to];
    cvta.to.global.u64 p, p;
    mov.u32 near, barrier;
    mov.u32 other, %cluster_ctarank;
    xor.b32 other, other, 1;
    mbarrier.init.shared::cta.b64 [near], 1;
    barrier.cluster.arrive;
    barrier.cluster.wait;
    st.global.b32 [p], other;
    mapa.shared::cluster.u32 far, near, other;
    mbarrier.arrive$1.shared::cluster.b64 _, [far];
again:
    mbarrier.try_wait.parity$2.shared::cta.b64 done, [near], 0;
    @!done bra again;
    ret;
}
PTX
    "$ptxas" -arch=sm_90a "$folder/one.ptx" -o "$folder/one.cubin"
    "$nvdisasm" "$folder/one.cubin" > "$folder/one.sass"
}

count() { grep -c "$1" "$folder/one.sass" || true; }

# The meeting of the cluster at the start has fences of its own, the same in both; they are taken off.
compiled "" ""
fences=$(count MEMBAR) caches=$(count CCTL.IVALL)
seen="plain: MEMBAR $((fences - fences)), CCTL.IVALL $((caches - caches))"$'\n'
compiled .release.cluster .acquire.cluster
seen+=".release.cluster and .acquire.cluster: MEMBAR $(($(count MEMBAR) - fences)), CCTL.IVALL $(($(count CCTL.IVALL) - caches))"$'\n'
printf %s "$seen"
[ "$seen" = "$(grep -E '^#   (plain|\.release)' "$0" | sed 's/^#   //')"$'\n' ]
