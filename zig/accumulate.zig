//! The value side of attention: outputs of up to four query rows += weights times the values of a page,
//! read as they are packed. Called by attend.zig through the kernel table.
const std = @import("std");
const vec = @import("vec.zig");
const format = @import("format.zig");
const prepare = @import("prepare.zig");
const score = @import("score.zig");
const F = vec.F;
const U = vec.U;
const I = vec.I;

pub const AccumulateArgs = extern struct {
    values: [*]const u8,
    /// The value half that will be read next; prefetched meanwhile.
    next: [*]const u8,
    /// Dimensions as stored.
    dim: usize,
    /// Blocks of 16 slots that hold any weight.
    first_block: usize,
    end_block: usize,
    /// Softmax weights, unnormalised; zero wherever a slot is not seen.
    weights: *align(64) const score.Scores,
    /// What the outputs so far are multiplied by first.
    corrections: *const [score.rows_max]f32,
    /// (row, output_stride)
    outputs: [*]f32,
    output_stride: usize,
};

pub fn accumulate(comptime T: type, comptime rows: usize, args: *const AccumulateArgs) void {
    if (T.quantized) return accumulate_integer(T, rows, args);
    const flight = if (vec.wide_registers) 4 else 2;
    const chunks = args.dim / vec.lanes;
    var chunk: usize = 0;
    while (chunk + flight <= chunks) : (chunk += flight) accumulate_float(T, rows, flight, args, chunk);
    while (chunk < chunks) : (chunk += 1) accumulate_float(T, rows, 1, args, chunk);
}

fn accumulate_float(
    comptime T: type,
    comptime rows: usize,
    comptime flight: usize,
    args: *const AccumulateArgs,
    chunk: usize,
) void {
    const chunk_bytes = vec.lanes * @sizeOf(T.Element);
    const row_bytes = args.dim * @sizeOf(T.Element);
    var sums: [rows][flight]F = undefined;
    inline for (0..rows) |r| inline for (0..flight) |i| {
        const at = args.outputs + r * args.output_stride + (chunk + i) * vec.lanes;
        sums[r][i] = vec.load(F, at) * vec.splat(args.corrections[r]);
    };
    for (args.first_block * format.block_slots..args.end_block * format.block_slots) |slot| {
        const at = slot * row_bytes + chunk * chunk_bytes;
        vec.prefetch(args.next + at, flight * chunk_bytes);
        var values: [flight]F = undefined;
        inline for (0..flight) |i| values[i] = T.load(args.values + at + i * chunk_bytes);
        inline for (0..rows) |r| {
            const w = vec.splat(args.weights[r][slot]);
            inline for (0..flight) |i| sums[r][i] += values[i] * w;
        }
    }
    inline for (0..rows) |r| inline for (0..flight) |i| {
        vec.store(args.outputs + r * args.output_stride + (chunk + i) * vec.lanes, sums[r][i]);
    };
}

/// Largest integer weight: two planes of seven bits and a sign.
const weight_limit: f32 = 63 * 128 + 63;

/// Groups whose weights are quantized together: their maxima fill one vector.
fn groups_at_once(comptime rows: usize) usize {
    return vec.lanes / rows;
}

/// Weights times scales become 14-bit integers per row and group, then exact integer dot products over
/// the tokens of the page.
fn accumulate_integer(comptime T: type, comptime rows: usize, args: *const AccumulateArgs) void {
    @setEvalBranchQuota(100_000); // everything below is unrolled
    const groups = args.dim / format.group;
    const codes_bytes = args.dim * format.page_tokens * T.bits / 8;
    const scales: [*]const f16 = @ptrCast(@alignCast(args.values + codes_bytes));
    const at_once = comptime groups_at_once(rows);
    var first: usize = 0;
    while (first < groups) : (first += at_once) {
        var maxima: [vec.lanes]F = undefined;
        inline for (0..at_once) |i| {
            // Past the last group: its own weights again, unused.
            const g = @min(first + i, groups - 1);
            var scale: [format.blocks_per_page]F = undefined;
            inline for (0..format.blocks_per_page) |b| scale[b] = @abs(load_scale(scales, g, b));
            inline for (0..rows) |r| {
                var top = weight(args, r, 0) * scale[0];
                inline for (1..format.blocks_per_page) |b| top = vec.max(top, weight(args, r, b) * scale[b]);
                maxima[i * rows + r] = top;
            }
        }
        const top = vec.reduce_each(.max, &maxima);
        const units: [vec.lanes]f32 = top * vec.splat(1.0 / weight_limit);
        // Weights whose largest is this small are worth nothing, and their reciprocal overflows.
        const worth = top > vec.splat(1e-30);
        const inverses: [vec.lanes]f32 = @select(f32, worth, vec.splat(weight_limit) / top, vec.splat(0));
        for (0..@min(at_once, groups - first)) |i| {
            vec.prefetch(args.next + codes_bytes + (first + i) * format.page_tokens * 2, format.page_tokens * 2);
            accumulate_group(T, rows, args, scales, first + i, inverses[i * rows ..][0..rows], units[i * rows ..][0..rows]);
        }
    }
}

inline fn weight(args: *const AccumulateArgs, row: usize, block: usize) F {
    return vec.load(F, @as([*]const f32, &args.weights[row]) + block * 16);
}

inline fn load_scale(scales: [*]const f16, g: usize, block: usize) F {
    return vec.from_f16(16, vec.load(@Vector(16, f16), scales + g * format.page_tokens + block * 16));
}

fn accumulate_group(
    comptime T: type,
    comptime rows: usize,
    args: *const AccumulateArgs,
    scales: [*]const f16,
    g: usize,
    inverses: *const [rows]f32,
    units: *const [rows]f32,
) void {
    @setEvalBranchQuota(100_000); // everything below is unrolled
    const bias = if (T.bits == 8) vec.code_bias else T.offset;
    const loads = format.block_slots / T.chunks_per_load;
    const halves = format.group / vec.lanes;
    var planes: [2][rows][format.block_slots]i32 align(64) = undefined;
    var sums: [2][rows][halves]vec.Accumulator = undefined;
    var scale: [format.blocks_per_page]F = undefined;
    inline for (0..format.blocks_per_page) |b| scale[b] = load_scale(scales, g, b);
    inline for (0..rows) |r| {
        const total = quantize_weights(args, r, &scale, inverses[r], &planes[0][r], &planes[1][r]);
        inline for (0..halves) |h| {
            sums[0][r][h] = .init(0);
            sums[1][r][h] = .init(-bias *% total);
        }
    }
    for (0..loads) |l| {
        const at = (g * loads + l) * format.group * 4;
        vec.prefetch(args.next + at, format.group * 4);
        var codes: [halves]vec.Codes = undefined;
        inline for (0..halves) |h| codes[h] = score.load_codes(T, args.values + at + h * 64);
        inline for (0..T.chunks_per_load) |which| inline for (0..rows) |r| inline for (0..2) |p| {
            const word = planes[p][r][l * T.chunks_per_load + which];
            inline for (0..halves) |h| sums[p][r][h].dot(score.select_nibbles(T, codes[h], which), word);
        };
    }
    inline for (0..rows) |r| inline for (0..halves) |h| {
        const sum = (sums[0][r][h].get() << @splat(7)) +% sums[1][r][h].get();
        const at = args.outputs + r * args.output_stride + g * format.group + h * vec.lanes;
        const before = vec.load(F, at) * vec.splat(args.corrections[r]);
        vec.store(at, before + @as(F, @floatFromInt(sum)) * vec.splat(units[r]));
    };
}

/// Planes of the integer weights of one row: word j holds the tokens j, j+16, j+32, j+48. Returns the sum
/// of the integers.
inline fn quantize_weights(
    args: *const AccumulateArgs,
    row: usize,
    scale: *const [format.blocks_per_page]F,
    inverse: f32,
    high_words: *align(64) [format.block_slots]i32,
    low_words: *align(64) [format.block_slots]i32,
) i32 {
    var high: U = @splat(0);
    var low: U = @splat(0);
    var total: I = @splat(0);
    const byte: U = @splat(255);
    inline for (0..format.blocks_per_page) |b| {
        const integers = vec.round_to_int(weight(args, row, b) * scale[b] * vec.splat(inverse));
        total +%= integers;
        const low_part = prepare.low_plane(integers);
        const high_part = (integers -% low_part) >> @splat(7);
        low |= (@as(U, @bitCast(low_part)) & byte) << @splat(8 * b);
        high |= (@as(U, @bitCast(high_part)) & byte) << @splat(8 * b);
    }
    vec.store(high_words, high);
    vec.store(low_words, low);
    return @reduce(.Add, total);
}
