// x [rows, depth] times W^T [columns, depth] in 16 bit, finished in fp32: the rest of the LayerNorm before it, then GELU
// or the rotary embedding of q and k. For compute capability 9.0.
//
// A block has a warp that loads, and two groups of four warps that take turns: one multiplies a tile of 128 x 160 while
// the other finishes and stores its own, so the tensor cores do not wait. Two blocks lie side by side on two
// multiprocessors, with neighbouring rows and the same columns: each loads half of the tile of W, for both.
//
// Compiled with ROWS, COLUMNS, DEPTH, PIECE and STAGES, see `pingpong.py`, ELEMENT (f16 or bf16), HEAD_DIM (16, 24, 32 or
// 64, for the rotary embedding, else GELU) and SHIFTED (whether there is a shift).

struct __align__(64) TensorMap { u64 opaque[16]; };

constexpr int PIECES = COLUMNS / PIECE;
#ifdef HEAD_DIM
constexpr int PERIOD = HEAD_DIM / 8;  // blocks of eight columns after which angles come again
#else
constexpr int PERIOD = 1;
#endif
constexpr int X_BYTES = ROWS * DEPTH * 2, W_BYTES = COLUMNS * DEPTH * 2, STAGE = X_BYTES + W_BYTES;
constexpr int OWN_BYTES = 16 * PIECE * 2;  // what a warp has of a piece; there is room for two

__device__ __forceinline__ void begin_barrier(u32 barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void wait(u32 barrier, u32 phase) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}"
        ::"r"(barrier), "r"(phase) : "memory");
}

__device__ __forceinline__ void expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void load(u32 to, const TensorMap* from, int column, int row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        ::"r"(to), "l"(from), "r"(column), "r"(row), "r"(barrier) : "memory");
}

// Arrive at the barrier that lies there in the shared memory of block `rank` of the pair.
__device__ __forceinline__ void arrive(u32 barrier, u32 rank) {
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}"
        ::"r"(barrier), "r"(rank) : "memory");
}

__device__ __forceinline__ void meet_pair() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ void load_for_pair(u32 to, const TensorMap* from, int column, int row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%2, %3}], [%4], %5;"
        ::"r"(to), "l"(from), "r"(column), "r"(row), "r"(barrier), "h"((u16)3) : "memory");
}

// Rows of 128 bytes, swizzled; eight of them are 1,024 bytes.
__device__ __forceinline__ u64 matrix(u32 address) {
    return (u64)((address & 0x3FFFF) >> 4) | ((u64)1 << 16) | ((u64)64 << 32) | ((u64)1 << 62);
}

__device__ __forceinline__ void multiply(float (&acc)[80], u64 x, u64 w) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n160k16.f32." ELEMENT "." ELEMENT " {" OUTPUTS "}, %80, %81, 1, 1, 1, 0, 0;"
        : ACCUMULATORS : "l"(x), "l"(w));
}

// The groups multiply in turn: a phase of a barrier has a parity only, by which one that is a tile ahead would be misled.
__device__ __forceinline__ void await_turn(int group) { asm volatile("bar.sync %0, 256;" ::"r"(3 + group) : "memory"); }
__device__ __forceinline__ void give_turn(int group) { asm volatile("bar.arrive %0, 256;" ::"r"(4 - group) : "memory"); }

__device__ __forceinline__ void meet_group(int group) { asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory"); }

// As `linear.gelu`.
__device__ __forceinline__ float gelu(float x) {
    float u;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(u) : "f"(fabsf(x)), "f"(5.5f));  // what is not a number must stay so
    float tail = fmaf(-0.0004732940529956741f, u, 0.0070844615818969605f);
    tail = fmaf(tail, u, -0.051827169923294815f);
    tail = fmaf(tail, u, -0.45999264343102614f);
    tail = fmaf(tail, u, -1.150787771152698f);
    tail = fmaf(tail, u, -1.0000376321483986f);
    return fmaf(-u, exp2_of(tail), fmaxf(x, 0.0f));
}

__device__ __forceinline__ float2 turned(float2 a, float2 angle) {
    return make_float2(a.x * angle.x - a.y * angle.y, a.y * angle.x + a.x * angle.y);
}

// Where tile `number` of a pair of blocks lies. Eight pairs of rows share the columns of W that are in the cache.
__device__ __forceinline__ void place(int number, int down, int across, int& row, int& column) {
    int in_group = 8 * across, group = number / in_group * 8, size = min(down - group, 8);
    row = group + number % in_group % size;
    column = number % in_group / size;
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1) pingpong(
    const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, u16* __restrict__ y,
    const float* __restrict__ scales, const float* __restrict__ shift, const float* __restrict__ bias,
    const float* __restrict__ table, const int* __restrict__ positions, int rows, int columns, int depth, int rotated) {
    extern __shared__ char memory[];
    u32 base = (shared_address(memory) + 1023) & ~1023u;
    u32 stages = base, buffers = base + STAGES * STAGE, full = buffers + 16 * OWN_BYTES, empty = full + 8 * STAGES;
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    int group = threadIdx.x / 128;
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            begin_barrier(full + 8 * s, 1);
            begin_barrier(empty + 8 * s, 2);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    meet_pair();
    int down = (rows + 2 * ROWS - 1) / (2 * ROWS), across = (columns + COLUMNS - 1) / COLUMNS, tiles = down * across;
    int steps = (depth + DEPTH - 1) / DEPTH, pair = blockIdx.x / 2, pairs = gridDim.x / 2;
    if (group == 2) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == 256) {
            int stage = 0;
            u32 phase = 1;
            for (int tile = pair; tile < tiles; tile += pairs) {
                int row, column;
                place(tile, down, across, row, column);
                row = (2 * row + rank) * ROWS, column = column * COLUMNS + rank * (COLUMNS / 2);
                for (int step = 0; step < steps; step++) {
                    wait(empty + 8 * stage, phase);
                    expect(full + 8 * stage, STAGE);
                    u32 to = stages + stage * STAGE;
                    load(to, &x, step * DEPTH, row, full + 8 * stage);
                    load_for_pair(to + X_BYTES + rank * (W_BYTES / 2), &w, step * DEPTH, column, full + 8 * stage);
                    if (++stage == STAGES) stage = 0, phase ^= 1;
                }
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        __shared__ float2 vectors[2][2][COLUMNS / 2];  // biases and shifts of the group's tile
        int thread = threadIdx.x % 128, lane = thread % 32, own = thread / 32 * 16;
        // Rows of 64 bytes; their four parts change places, so that eight rows in one column lie in different banks.
        u32 buffer = buffers + threadIdx.x / 32 * 2 * OWN_BYTES, to = buffer + lane % 16 * 64;
        u32 from = buffer + lane / 4 * 64 + ((lane % 4) ^ (lane / 8 % 4)) * 16;
        if (group == 1) give_turn(group);
        // This group has every second tile of the pair.
        int stage = group * steps % STAGES;
        u32 phase = group * steps / STAGES & 1;
        for (int tile = pair + group * pairs; tile < tiles; tile += 2 * pairs) {
            int row, column;
            place(tile, down, across, row, column);
            row = (2 * row + rank) * ROWS + own, column *= COLUMNS;
            float2 own_bias = make_float2(0.0f, 0.0f), own_shift = own_bias;
            if (thread < COLUMNS / 2 && column + 2 * thread < columns) {
                own_bias = __ldg((const float2*)(bias + column) + thread);
#ifdef SHIFTED
                own_shift = __ldg((const float2*)(shift + column) + thread);
#endif
            }
            float acc[2][80], scale[2][2];
            [[maybe_unused]] int position[2][2];
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int below = 0; below < 2; below++) {
                    int r = row + half * 64 + lane / 4 + 8 * below;
                    scale[half][below] = r < rows ? __ldg(scales + r) : 0.0f;
#ifdef HEAD_DIM
                    position[half][below] = r < rows ? __ldg(positions + r) * HEAD_DIM + lane % 4 * 2 : 0;
#endif
                }
            meet_group(group);  // all are done with the vectors of the tile before
            if (thread < COLUMNS / 2) {
                vectors[group][0][thread] = own_bias;
                vectors[group][1][thread] = own_shift;
            }
            meet_group(group);
#pragma unroll
            for (int i = 0; i < 20; i++) {
#ifdef SHIFTED
                float2 add = vectors[group][1][i * 4 + lane % 4];
#else
                float2 add = make_float2(0.0f, 0.0f);
#endif
#pragma unroll
                for (int half = 0; half < 2; half++)
#pragma unroll
                    for (int below = 0; below < 2; below++)
                        acc[half][i * 4 + below * 2] = add.x, acc[half][i * 4 + below * 2 + 1] = add.y;
            }
            u32 previous = 0;
            await_turn(group);
#pragma unroll 1
            for (int step = 0; step < steps; step++) {
                wait(full + 8 * stage, phase);
                u32 at = stages + stage * STAGE;
                u64 above = matrix(at), below = matrix(at + 64 * DEPTH * 2), weights = matrix(at + X_BYTES);
                fence_products();
#pragma unroll
                for (int k = 0; k < DEPTH / 16; k++) {
                    multiply(acc[0], above + 2 * k, weights + 2 * k);
                    multiply(acc[1], below + 2 * k, weights + 2 * k);
                }
                end_products();
                if (step > 0) {
                    wait_products<1>();
                    if (thread < 2) arrive(previous, thread);
                }
                previous = empty + 8 * stage;
                if (++stage == STAGES) stage = 0, phase ^= 1;
            }
            give_turn(group);
            wait_products<0>();
            if (thread < 2) arrive(previous, thread);
            // The other group's steps come in between.
            stage += steps % STAGES;
            phase ^= steps / STAGES & 1;
            if (stage >= STAGES) stage -= STAGES, phase ^= 1;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                [[maybe_unused]] float2 angles[2][PERIOD];
#pragma unroll
                for (int turn = 0; turn < PIECES; turn++) {
                    // Heads of 64 are two pieces wide: all first halves come first, with the same angles.
                    int piece = PERIOD < 8 ? turn : turn < 3 ? 2 * turn : 2 * turn - 5;
#ifdef HEAD_DIM
                    if (turn == 0 || PERIOD == 8 && turn == 3)
#pragma unroll
                        for (int below = 0; below < 2; below++)
#pragma unroll
                            for (int block = 0; block < (PERIOD < 4 ? PERIOD : 4); block++) {
                                int c = position[half][below] + (column + piece * PIECE + block * 8) % HEAD_DIM;
                                angles[below][block] = __ldg((const float2*)(table + c));
                            }
#endif
                    u32 packed[4][2];
#pragma unroll
                    for (int block = 0; block < 4; block++) {
                        int j = piece * 4 + block;
                        float2 add = vectors[group][0][j * 4 + lane % 4];
#pragma unroll
                        for (int below = 0; below < 2; below++) {
                            const float* a = &acc[half][j * 4 + 2 * below];
                            float2 found;
                            found.x = fmaf(a[0], scale[half][below], add.x);
                            found.y = fmaf(a[1], scale[half][below], add.y);
#ifdef HEAD_DIM
                            float2 other = turned(found, angles[below][PERIOD < 4 ? j % PERIOD : block]);
                            if (column + j * 8 < rotated) found = other;
#else
                            found = make_float2(gelu(found.x), gelu(found.y));
#endif
                            packed[block][below] = rounded(found.x, found.y);
                        }
                    }
                    // The other room was read before the warp last met, so this one, read before that, is free.
                    u32 room = (half * PIECES + turn) % 2 * OWN_BYTES;
#pragma unroll
                    for (int block = 0; block < 4; block += 2)
                        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                                     ::"r"(to + room + ((block + lane / 16) ^ (lane / 2 % 4)) * 16), "r"(packed[block][0]),
                                     "r"(packed[block][1]), "r"(packed[block + 1][0]), "r"(packed[block + 1][1]));
                    asm volatile("bar.warp.sync 0xffffffff;");
#pragma unroll
                    for (int part = 0; part < 2; part++) {
                        int r = row + half * 64 + part * 8 + lane / 4, c = column + piece * PIECE;
                        u16* there = y + (u64)r * columns + c + lane % 4 * 8;
                        asm volatile(
                            "{\n.reg .pred p;\n.reg .b32 a, b, c, d;\nsetp.ne.b32 p, %2, 0;\n"
                            "ld.shared.v4.b32 {a, b, c, d}, [%1];\n@p st.global.v4.b32 [%0], {a, b, c, d};\n}"
                            ::"l"(there), "r"(from + room + part * 512), "r"((int)(r < rows && c < columns)));
                    }
                }
            }
        }
    }
    __syncwarp();
    meet_pair();
}
