//! The value side of attention: outputs of up to four query rows += weights times the values of a
//! page, read as they are packed. Called by step.zig through the kernel table.
const vec = @import("vec.zig");
const format = @import("format.zig");
const score = @import("score.zig");
const ahead_file = @import("ahead.zig");
const Ahead = ahead_file.Ahead;
const Spread = ahead_file.Spread;
const F = vec.F;
const U = vec.U;
const I = vec.I;

pub const AccumulateArgs = extern struct {
    values: [*]const u8,
    ahead: Ahead,
    /// Dimensions as stored.
    dim: usize,
    /// Slots outside these have no weight.
    first_slot: usize,
    end_slot: usize,
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
    const slots = args.end_slot - args.first_slot;
    var spread = args.ahead.over((chunks / flight + chunks % flight) * slots);
    var chunk: usize = 0;
    while (chunk + flight <= chunks) : (chunk += flight) {
        accumulate_float(T, rows, flight, args, chunk, &spread);
    }
    while (chunk < chunks) : (chunk += 1) accumulate_float(T, rows, 1, args, chunk, &spread);
}

fn accumulate_float(
    comptime T: type,
    comptime rows: usize,
    comptime flight: usize,
    args: *const AccumulateArgs,
    chunk: usize,
    spread: *Spread,
) void {
    const chunk_bytes = vec.lanes * @sizeOf(T.Element);
    const row_bytes = args.dim * @sizeOf(T.Element);
    var sums: [rows][flight]F = undefined;
    inline for (0..rows) |r| inline for (0..flight) |i| {
        const at = args.outputs + r * args.output_stride + (chunk + i) * vec.lanes;
        sums[r][i] = vec.load(F, at) * vec.splat(args.corrections[r]);
    };
    for (args.first_slot..args.end_slot) |slot| {
        const at = slot * row_bytes + chunk * chunk_bytes;
        spread.turn();
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

/// Integer weights of all rows for as many groups as fill one vector with (group, row) pairs.
fn Weights(comptime rows: usize) type {
    return struct {
        const groups = vec.lanes / rows;
        /// (pair, quad of tokens): four int8 a word; word j holds the tokens j, j+16, j+32, j+48
        high: [vec.lanes][format.block_slots]i32 align(64),
        low: [vec.lanes][format.block_slots]i32 align(64),
        /// (pair): sum of the integers, and what one unit of them is worth
        totals: [vec.lanes]i32,
        units: [vec.lanes]f32,
    };
}

/// Weights times scales become 14-bit integers per row and group, then exact integer dot products
/// over the tokens of the page.
fn accumulate_integer(comptime T: type, comptime rows: usize, args: *const AccumulateArgs) void {
    const groups = args.dim / format.group;
    const codes_bytes = args.dim * format.page_tokens * T.bits / 8;
    const scales: [*]const f16 = @ptrCast(@alignCast(args.values + codes_bytes));
    var weights: Weights(rows) = undefined;
    var spread = args.ahead.over(groups * (rows + loads_per_group(T)));
    var first: usize = 0;
    while (first < groups) : (first += Weights(rows).groups) {
        const count = @min(Weights(rows).groups, groups - first);
        quantize_weights(T, rows, args, scales, first, count, &weights, &spread);
        for (0..count) |i| {
            accumulate_group(T, rows, args, first + i, i * rows, &weights, &spread);
        }
    }
}

fn loads_per_group(comptime T: type) usize {
    return format.block_slots / T.chunks_per_load;
}

inline fn weight(args: *const AccumulateArgs, row: usize, block: usize) F {
    return vec.load(F, @as([*]const f32, &args.weights[row]) + block * 16);
}

inline fn load_scale(scales: [*]const f16, g: usize, block: usize) F {
    const at = scales + g * format.page_tokens + block * 16;
    return vec.from_f16(16, vec.load(@Vector(16, f16), at));
}

fn quantize_weights(
    comptime T: type,
    comptime rows: usize,
    args: *const AccumulateArgs,
    scales: [*]const f16,
    first: usize,
    count: usize,
    weights: *Weights(rows),
    spread: *Spread,
) void {
    var maxima: [vec.lanes]F = @splat(vec.splat(0));
    for (0..count) |i| {
        var tops: [rows]F = @splat(vec.splat(0));
        for (0..format.blocks_per_page) |b| {
            const scale = @abs(load_scale(scales, first + i, b));
            inline for (0..rows) |r| tops[r] = vec.max(tops[r], weight(args, r, b) * scale);
        }
        inline for (0..rows) |r| maxima[i * rows + r] = tops[r];
    }
    const top = vec.reduce_each(.max, &maxima);
    weights.units = top * vec.splat(1.0 / weight_limit);
    // Weights whose largest is this small are worth nothing, and their reciprocal overflows.
    const worth = top > vec.splat(1e-30);
    const inverses: [vec.lanes]f32 = @select(
        f32,
        worth,
        vec.splat(weight_limit) / top,
        vec.splat(0),
    );
    var sums: [vec.lanes]I = @splat(@splat(0));
    for (0..count) |i| {
        var scale: [format.blocks_per_page]F = undefined;
        inline for (0..format.blocks_per_page) |b| scale[b] = load_scale(scales, first + i, b);
        for (0..rows) |r| {
            spread.turn();
            const pair = i * rows + r;
            sums[pair] = split_weights(
                T,
                args,
                r,
                &scale,
                inverses[pair],
                &weights.high[pair],
                &weights.low[pair],
            );
        }
    }
    weights.totals = vec.sum_each(&sums);
}

/// The planes of one row's integer weights; returns their sums over the blocks. The low plane stays
/// within [-64, 64) for formats whose codes fill a byte.
inline fn split_weights(
    comptime T: type,
    args: *const AccumulateArgs,
    row: usize,
    scale: *const [format.blocks_per_page]F,
    inverse: f32,
    high_words: *align(64) [format.block_slots]i32,
    low_words: *align(64) [format.block_slots]i32,
) I {
    const centre = if (T.bits == 8) 64 else 0;
    const magic = vec.round_magic + centre;
    var high: U = @splat(0);
    var low: U = @splat(0);
    var total: U = @splat(0);
    inline for (0..format.blocks_per_page) |b| {
        // The integer, plus `centre`, stands in the low bits of the sum with the magic number.
        const bits: U = @bitCast(
            weight(args, row, b) * (scale[b] * vec.splat(inverse)) + vec.splat(magic),
        );
        total +%= bits;
        low |= (bits << @splat(8 * b)) & @as(U, @splat(0x7f << (8 * b)));
        const shifted = if (b == 0) bits >> @splat(7) else bits << @splat(8 * b - 7);
        high |= shifted & @as(U, @splat(0xff << (8 * b)));
    }
    if (centre != 0) {
        low = @bitCast(@as(vec.Codes, @bitCast(low)) -% @as(vec.Codes, @splat(centre)));
    }
    vec.store(high_words, high);
    vec.store(low_words, low);
    const magic_bits: u32 = @bitCast(@as(f32, magic));
    return @bitCast(total -% @as(U, @splat(format.blocks_per_page *% magic_bits)));
}

fn accumulate_group(
    comptime T: type,
    comptime rows: usize,
    args: *const AccumulateArgs,
    g: usize,
    pair: usize,
    weights: *const Weights(rows),
    spread: *Spread,
) void {
    @setEvalBranchQuota(100_000); // everything below is unrolled
    const bias = if (T.bits == 8) vec.code_bias else T.offset;
    const loads = loads_per_group(T);
    const halves = format.group / vec.lanes;
    var sums: [2][rows][halves]vec.Accumulator = undefined;
    inline for (0..rows) |r| inline for (0..halves) |h| {
        sums[0][r][h] = .init(0);
        sums[1][r][h] = .init(-bias *% weights.totals[pair + r]);
    };
    for (0..loads) |l| {
        const at = (g * loads + l) * format.group * 4;
        spread.turn();
        var codes: [halves]vec.Codes = undefined;
        inline for (0..halves) |h| codes[h] = score.load_codes(T, args.values + at + h * 64);
        inline for (0..T.chunks_per_load) |which| inline for (0..rows) |r| {
            const quad = l * T.chunks_per_load + which;
            inline for (0..halves) |h| {
                const selected = score.select_nibbles(T, codes[h], which);
                sums[0][r][h].dot(selected, weights.high[pair + r][quad]);
                sums[1][r][h].dot(selected, weights.low[pair + r][quad]);
            }
        };
    }
    inline for (0..rows) |r| inline for (0..halves) |h| {
        const sum = (sums[0][r][h].get() << @splat(7)) +% sums[1][r][h].get();
        const at = args.outputs + r * args.output_stride + g * format.group + h * vec.lanes;
        const before = vec.load(F, at) * vec.splat(args.corrections[r]);
        vec.store(at, before + @as(F, @floatFromInt(sum)) * vec.splat(weights.units[pair + r]));
    };
}
