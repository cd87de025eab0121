// Attention of each segment to itself in 16 bit, scores, exponentials and sums in fp32. For compute capability 9.0.
//
// A block of four warps has 64 queries of one segment, and takes its keys from the first, 64 at a time, head after
// head; what it needs next is loaded meanwhile. While some blocks of a multiprocessor multiply, others take exponentials.
//
// Compiled with HEAD_DIM (16, 24, 32 or 64), ELEMENT (f16 or bf16), AHEAD (blocks of keys that are loaded early),
// BLOCKS (on a multiprocessor), HEADS (of a block), perhaps LEFT (rows of q and of k are still to be multiplied), and
// operands of products, see `hopper_attention.py`.

#define INFINITY __int_as_float(0x7f800000)

constexpr int KEYS = 64, THREADS = 128;
constexpr int WIDE = HEAD_DIM <= 16 ? 16 : HEAD_DIM <= 32 ? 32 : 64;
constexpr int ROW = WIDE * 2, TILE = KEYS * ROW, PARTS = WIDE / 8;  // bytes; parts of 16 bytes of a row
constexpr int STEP = THREADS / PARTS;                               // rows that are copied at a time
constexpr int QUERY_ROOMS = AHEAD + 1, KEY_ROOMS = AHEAD + 1, VALUE_ROOMS = AHEAD + 2;
constexpr float LARGEST = 16384.0f;  // sum of weights that 16 bit can hold

// Where a part of a row lies, so that eight rows of one column are in different banks.
__device__ __forceinline__ u32 place(int row, int part) {
    u32 at = row * ROW + part * 16;
    return at ^ ((at >> 7 & (PARTS - 1)) << 4);
}

// An operand at that address / 16: eight rows, swizzled, are its unit.
__device__ __forceinline__ u64 matrix(u32 address) {
    return (u64)(8 * ROW / 16 | (ROW == 128 ? 1 : ROW == 64 ? 2 : 3) << 30) << 32 | address + (1 << 16);
}

// The first `rows` of 64 rows of a head to shared memory, then zeros; `from` and `to` are of this thread's first part.
__device__ __forceinline__ void copy(u32 to, const u16* from, u32 stride, int rows) {
    int row = threadIdx.x / PARTS, part = threadIdx.x % PARTS;
#pragma unroll
    for (int i = 0; i < KEYS / STEP; i++)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     ::"r"(to + i * STEP * ROW), "l"(from + (u64)i * STEP * stride),
                     "r"(row + i * STEP < rows && part < HEAD_DIM / 8 ? 16 : 0) : "memory");
}

__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// What threads wrote is to be read by products.
__device__ __forceinline__ void fence_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void begin_scores(float (&s)[32], u64 q, u64 k) {
    asm volatile(
        "{\n.reg .pred more;\nsetp.ne.b32 more, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." ELEMENT "." ELEMENT " {" S_OUTPUTS "}, %32, %33, more, 1, 1, 0, 0;\n}"
        : S_RESULTS : "l"(q), "l"(k));
}

__device__ __forceinline__ void add_scores(float (&s)[32], u64 q, u64 k) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." ELEMENT "." ELEMENT " {" S_OUTPUTS "}, %32, %33, 1, 1, 1, 0, 0;"
        : S_ACCUMULATORS : "l"(q), "l"(k));
}

__device__ __forceinline__ void add_values(float (&o)[HEAD_DIM / 2], const u32 (&p)[4], u64 v) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n" HEAD_TEXT "k16.f32." ELEMENT "." ELEMENT " {" O_OUTPUTS "}, {" P_INPUTS "}, "
        V_INPUT ", 1, 1, 1, 1;"
        : O_ACCUMULATORS : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v));
}

__device__ __forceinline__ float largest_of_quad(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

__device__ __forceinline__ float sum_of_quad(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// Two rows of a thread, the second eight below the first: the factor of their scores, what is then subtracted, the sums
// of their weights, and weights times values.
struct Rows {
    float scale[2], top[2], sum[2], out[HEAD_DIM / 2];
};

// Scores to weights and to their sums. Whether they are small enough for 16 bit, in all rows of the warp.
template <bool TAIL>
__device__ __forceinline__ bool weigh(const float (&s)[32], u32 (&p)[4][4], float (&sum)[2], const Rows& rows, int keys) {
    float odd[2] = {0.0f, 0.0f};
    sum[0] = sum[1] = 0.0f;
#pragma unroll
    for (int t = 0; t < 4; t++) {
        if (TAIL && 16 * t >= keys) {
#pragma unroll
            for (int i = 0; i < 4; i++) p[t][i] = 0;
            continue;
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {  // the third and the fourth are eight columns further
            float a = exp2_of(fmaf(s[8 * t + 2 * i], rows.scale[i % 2], -rows.top[i % 2]));
            float b = exp2_of(fmaf(s[8 * t + 2 * i + 1], rows.scale[i % 2], -rows.top[i % 2]));
            sum[i % 2] += a, odd[i % 2] += b;
            p[t][i] = rounded(a, b);
        }
    }
    sum[0] += odd[0], sum[1] += odd[1];
    return !__any_sync(0xffffffff, sum[0] > LARGEST || sum[1] > LARGEST);
}

// Take the weights of a block of keys. What is subtracted from scores comes from the first block, and from a later one
// only if weights become too large; so most blocks are not searched for their largest score.
template <bool TAIL>
__device__ __forceinline__ void take(float (&s)[32], u32 (&p)[4][4], Rows& rows, int keys, bool first) {
    float sum[2];
    if (TAIL)
#pragma unroll
        for (int t = 0; t < 4; t++) {
            if (16 * t + 16 <= keys) continue;
#pragma unroll
            for (int i = 8 * t; i < 8 * t + 8; i++)
                if (i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2 >= keys) s[i] = -INFINITY;
        }
    if (first || !weigh<TAIL>(s, p, sum, rows, keys)) {
        float top[2] = {s[0], s[2]};
#pragma unroll
        for (int t = 0; t < 4; t++) {
            if (TAIL && 16 * t >= keys) break;
#pragma unroll
            for (int i = 8 * t; i < 8 * t + 8; i++) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], s[i]);
        }
#pragma unroll
        for (int below = 0; below < 2; below++) {
            float larger = fmaxf(rows.top[below], largest_of_quad(top[below]) * rows.scale[below]);
            float shrink = exp2_of(rows.top[below] - larger);
            rows.top[below] = larger, rows.sum[below] *= shrink;
#pragma unroll
            for (int j = 0; j < HEAD_DIM / 8; j++)
                rows.out[4 * j + 2 * below] *= shrink, rows.out[4 * j + 2 * below + 1] *= shrink;
        }
        weigh<TAIL>(s, p, sum, rows, keys);
    }
    rows.sum[0] += sum[0], rows.sum[1] += sum[1];
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) hopper_attention(
    const u16* __restrict__ q, const u16* __restrict__ k, const u16* __restrict__ v,
    u16* __restrict__ out, const int* __restrict__ tiles, const float* __restrict__ q_scale,
    const float* __restrict__ k_scale, float scale, int stride, int heads, int count) {
    extern __shared__ __align__(1024) char memory[];
    u32 queries = shared_address(memory), key_rooms = queries + QUERY_ROOMS * TILE;
    u32 value_rooms = key_rooms + KEY_ROOMS * TILE;
    int first_head = blockIdx.x * HEADS, number = blockIdx.z * gridDim.y + blockIdx.y;
    if (number >= count) return;
    int first = tiles[3 * number], start = tiles[3 * number + 1], stop = tiles[3 * number + 2], length = stop - start;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32 * 16, column = first_head * HEAD_DIM;

    // Blocks are copied in the order in which they are used, those of the next head behind those of this.
    u32 own = place(threadIdx.x / PARTS, threadIdx.x % PARTS);
    q += (u64)(first + threadIdx.x / PARTS) * stride + column + threadIdx.x % PARTS * 8;
    u64 part = (u64)(start + threadIdx.x / PARTS) * stride + column + threadIdx.x % PARTS * 8;
    k += part, v += part;
    int copied_heads = min(HEADS, heads - first_head), left = copied_heads, there = length;
    u32 to_queries = queries + own, to_keys = key_rooms + own, to_values = value_rooms + own;
    auto copy_next = [&]() {
        if (copied_heads > 0) {
            if (there == length) {
                copy(to_queries, q, stride, stop - first);
                q += HEAD_DIM;
                if ((to_queries += TILE) == queries + QUERY_ROOMS * TILE + own) to_queries = queries + own;
            }
            copy(to_keys, k, stride, there);
            copy(to_values, v, stride, there);
            if ((to_keys += TILE) == key_rooms + KEY_ROOMS * TILE + own) to_keys = key_rooms + own;
            if ((to_values += TILE) == value_rooms + VALUE_ROOMS * TILE + own) to_values = value_rooms + own;
            k += KEYS * stride, v += KEYS * stride, there -= KEYS;
            if (there <= 0) {
                u64 back = (u64)(length - there) * stride - HEAD_DIM;
                k -= back, v -= back, there = length, copied_heads--;
            }
        }
        end_copies();
    };
#pragma unroll
    for (int i = 0; i < AHEAD; i++) copy_next();

    u32 query_room = queries >> 4, key_room = key_rooms >> 4, value_room = value_rooms >> 4;
    Rows rows;
#pragma unroll
    for (int below = 0; below < 2; below++) {
        rows.scale[below] = scale;
#ifdef LEFT
        int row = first + warp + lane / 4 + 8 * below;
        rows.scale[below] *= row < stop ? __ldg(q_scale + row) : 0.0f;
#endif
    }
#pragma unroll 1
    do {
        int keys = length;
        rows.top[0] = rows.top[1] = -INFINITY, rows.sum[0] = rows.sum[1] = 0.0f;
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; i++) rows.out[i] = 0.0f;
#pragma unroll 1
        do {
            wait_copies<AHEAD - 1>();
            fence_writes();
            // The block is there for all, who are done with the keys before it, and with the values before those.
            __syncthreads();
            float s[32];
            fence_products();
            begin_scores(s, matrix(query_room), matrix(key_room));
#pragma unroll
            for (int i = 1; i < WIDE / 16; i++) add_scores(s, matrix(query_room + 2 * i), matrix(key_room + 2 * i));
            end_products();
            copy_next();
#ifdef LEFT
            float2 factors[8];
#pragma unroll
            for (int j = 0; j < 8; j++) {
                int key = j * 8 + lane % 4 * 2;
                factors[j].x = key < keys ? __ldg(k_scale + stop - keys + key) : 0.0f;
                factors[j].y = key + 1 < keys ? __ldg(k_scale + stop - keys + key + 1) : 0.0f;
            }
#endif
            wait_products<0>();
#ifdef LEFT
#pragma unroll
            for (int i = 0; i < 32; i++) s[i] *= i % 2 ? factors[i / 4].y : factors[i / 4].x;
#endif
            u32 p[4][4];
            if (keys >= KEYS)
                take<false>(s, p, rows, keys, keys == length);
            else
                take<true>(s, p, rows, keys, keys == length);
            fence_products();
#pragma unroll
            for (int t = 0; t < 4; t++) add_values(rows.out, p[t], matrix(value_room + t * ROW));
            end_products();
            if ((key_room += TILE / 16) == (key_rooms + KEY_ROOMS * TILE) >> 4) key_room = key_rooms >> 4;
            if ((value_room += TILE / 16) == (value_rooms + VALUE_ROOMS * TILE) >> 4) value_room = value_rooms >> 4;
            keys -= KEYS;
        } while (keys > 0);
        wait_products<0>();
        __syncthreads();  // all are done with the queries of this head, whose room the results take
        u32 room = query_room << 4;
#pragma unroll
        for (int below = 0; below < 2; below++) {
            float share = __fdividef(1.0f, sum_of_quad(rows.sum[below]));
#pragma unroll
            for (int j = 0; j < HEAD_DIM / 8; j++) {
                u32 both = rounded(rows.out[4 * j + 2 * below] * share, rows.out[4 * j + 2 * below + 1] * share);
                asm volatile("st.shared.b32 [%0], %1;"
                             ::"r"(room + place(warp + 8 * below + lane / 4, j) + lane % 4 * 4), "r"(both) : "memory");
            }
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 16 * PARTS / 32; i++) {
            int row = warp + (i * 32 + lane) / PARTS, part = lane % PARTS;
            if (first + row < stop && part < HEAD_DIM / 8)
                asm volatile(
                    "{\n.reg .b32 a, b, c, d;\nld.shared.v4.b32 {a, b, c, d}, [%1];\n"
                    "st.global.v4.b32 [%0], {a, b, c, d};\n}"
                    ::"l"(out + ((u64)(first + row) * heads * HEAD_DIM + column + part * 8)),
                    "r"(room + place(row, part)) : "memory");
        }
        column += HEAD_DIM;
        if ((query_room += TILE / 16) == (queries + QUERY_ROOMS * TILE) >> 4) query_room = queries >> 4;
    } while (--left > 0);
}
