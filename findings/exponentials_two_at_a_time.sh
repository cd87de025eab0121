#!/usr/bin/env bash
# ptxas 13.5.37 (nvidia-cuda-nvcc): an exponential of two halves at once is two exponentials.
#
# `ex2.approx.f16x2` takes two fp16 numbers in one instruction of PTX, and kernels of attention are bound by exponentials, so
# we took it that it halves their time, as papers suggest. On every GPU that we compile for it becomes two instructions of the
# special-function unit, one for each half, as many as two exponentials in fp32 need. What it spares is a conversion; what it
# costs is that the exponent is rounded to fp16 first. `tanh.approx.f16x2` is two instructions as well.
#
# Needs: a Python with pip. Seen:
#   sm_80: ex2 f32 1, ex2 f16x2 2, tanh f16x2 2
#   sm_90a: ex2 f32 1, ex2 f16x2 2, tanh f16x2 2
#   sm_100a: ex2 f32 1, ex2 f16x2 2, tanh f16x2 2
#   sm_120a: ex2 f32 1, ex2 f16x2 2, tanh f16x2 2
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python -m pip install -q --target "$folder/packages" --no-deps nvidia-cuda-nvcc==13.5.37 nvidia-cuda-nvdisasm==13.5.37
ptxas=$(find "$folder/packages" -name ptxas -type f)
nvdisasm=$(find "$folder/packages" -name nvdisasm -type f)

special() { # architecture, instruction: how many instructions of the special-function unit it becomes
    cat > "$folder/one.ptx" <<PTX
.version 9.0
.target $1
.address_size 64
.visible .entry one(.param .u64 to) {
    .reg .b64 p;
    .reg .b32 x;
    ld.param.u64 p, [to];
    cvta.to.global.u64 p, p;
    ld.global.b32 x, [p];
    $2 x, x;
    st.global.b32 [p], x;
    ret;
}
PTX
    "$ptxas" -arch="$1" "$folder/one.ptx" -o "$folder/one.cubin"
    "$nvdisasm" "$folder/one.cubin" | grep -c MUFU
}

seen=""
for architecture in sm_80 sm_90a sm_100a sm_120a; do
    seen+="$architecture: ex2 f32 $(special "$architecture" ex2.approx.ftz.f32), "
    seen+="ex2 f16x2 $(special "$architecture" ex2.approx.f16x2), "
    seen+="tanh f16x2 $(special "$architecture" tanh.approx.f16x2)"$'\n'
done
printf %s "$seen"
[ "$seen" = "$(grep '^#   sm_' "$0" | sed 's/^#   //')"$'\n' ]
