//! The value side of attention: outputs of up to four query rows += weights times the values of a
//! page, read as they are packed. Called by step.zig through the kernel table.
const std = @import("std");
const dot = @import("dot.zig");
const vec = @import("vec.zig");
const format = @import("format.zig");
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
    /// Softmax weights, unnormalised; a negative zero wherever a slot is not seen.
    weights: [*]align(64) const [format.page_tokens]f32, // (row, slot)
    /// Whether there is such a slot. Quantized values then take one row at a time.
    any_hidden: bool,
    /// The largest weight of each row, and whether it is small beside the row's sum so far.
    largest: [*]const f32, // (row)
    minor: [*]const bool, // (row)
    /// What the outputs so far are multiplied by first.
    corrections: [*]const f32, // (row)
    /// (row, output_stride)
    outputs: [*]f32,
    output_stride: usize,
};

pub fn accumulate(comptime T: type, comptime rows: usize, args: *const AccumulateArgs) void {
    if (T.quantized) return accumulate_integer(T, rows, args);
    const flight = comptime float_flight(rows);
    const chunks = args.dim / vec.lanes;
    const slots = args.end_slot - args.first_slot;
    var spread = args.ahead.over((chunks / flight + chunks % flight) * slots);
    var chunk: usize = 0;
    while (chunk + flight <= chunks) : (chunk += flight) {
        accumulate_float(T, rows, flight, args, chunk, &spread);
    }
    while (chunk < chunks) : (chunk += 1) accumulate_float(T, rows, 1, args, chunk, &spread);
}

/// Chunks of the dimension whose sums the registers hold.
pub fn float_flight(rows: usize) usize {
    return if (vec.wide_registers) 4 else @max(1, vec.sums_max / rows);
}

/// Rows of floating-point values, `flight` chunks of 16 dimensions from `chunk` on.
pub fn accumulate_float(
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
    // Not read from `args` again and again: `vec.times` may have changed it, for all LLVM knows.
    var weights: [rows][*]const f32 = undefined;
    inline for (&weights, 0..) |*of_row, r| of_row.* = &args.weights[r];
    var at = args.values + args.first_slot * row_bytes + chunk * chunk_bytes;
    var values = load_values(T, flight, at);
    for (args.first_slot..args.end_slot) |slot| {
        spread.turn();
        if (!vec.converts_early) values = load_values(T, flight, at);
        const used = values;
        if (!vec.converts_early or slot + 1 < args.end_slot) at += row_bytes;
        if (vec.converts_early) values = load_values(T, flight, at);
        inline for (&sums, weights) |*of_row, of_weights| {
            inline for (of_row, used) |*sum, some| sum.* += vec.times(some, of_weights, slot);
        }
    }
    inline for (0..rows) |r| inline for (0..flight) |i| {
        vec.store(args.outputs + r * args.output_stride + (chunk + i) * vec.lanes, sums[r][i]);
    };
}

inline fn load_values(comptime T: type, comptime flight: usize, at: [*]const u8) [flight]F {
    var values: [flight]F = undefined;
    inline for (&values, 0..) |*some, i| {
        some.* = vec.early(T.load(at + i * vec.lanes * @sizeOf(T.Element)));
    }
    return values;
}

/// Softmax weights and scales are 15-bit fixed point, relative to the largest of the page.
const weight_one: f32 = 32767;

/// Below every weight and scale but zero: keeps zeros from being divided by zero.
const tiny: f32 = 1e-30;

/// Bits of the low one of two planes. Beside codes that fill a byte, 7 are the most that no
/// instruction set saturates at.
pub fn low_bits(comptime T: type) comptime_int {
    return if (T.bits == 8) 7 else 8;
}

/// What the largest scale of a group becomes: products of weights and scales are integers up to
/// this.
fn scale_one(comptime T: type) comptime_int {
    return if (T.bits == 8) 127 << 7 | 127 else 127 << 8;
}

/// What one of those integers, times a code's unit, is worth, where the largest weight and scale
/// are one.
fn unit_one(comptime T: type) f32 {
    const whole: f32 = if (T.half_levels) 2 else 1;
    return 32768.0 / (weight_one * scale_one(T)) / whole;
}

/// 15-bit integers of 64 slots, as 16-bit lanes: (j, j+32) of the first pair of blocks, then (j+16,
/// j+48) of the second.
pub const Slots = [2]dot.Halves;

/// Integer weights of a block of rows for one group.
pub fn Weights(comptime rows: usize, comptime planes: usize) type {
    return struct {
        /// (plane, row, quad of tokens): four int8 a word; word j holds the tokens j, j+16, j+32,
        /// j+48. The last plane is the low one.
        planes: [planes][rows][format.block_slots]i32 align(64),
        /// (row): what a sum begins with, because codes have an offset, and what one unit of it is
        /// worth
        biases: [rows]i32,
        units: [rows]f32,
    };
}

/// Weights times scales become integers per row and group, then exact integer dot products over the
/// tokens of the page.
///
/// The integers have 15 bits, in two int8 planes. Beside codes of up to 4 bits one plane of 8 bits
/// is enough where no token of the page is a major one: dither keeps the sum of many small weights
/// right, so what it adds stays well below what storing lost.
fn accumulate_integer(comptime T: type, comptime rows: usize, args: *const AccumulateArgs) void {
    rescale(rows, args);
    const minor: @Vector(rows, bool) = args.minor[0..rows].*;
    if (T.bits <= 4 and @reduce(.And, minor)) {
        accumulate_planes(T, rows, 1, args);
    } else accumulate_planes(T, rows, 2, args);
}

/// Multiplies the outputs so far by the corrections, which are one wherever the page has no larger
/// logit than those before it: for most pages there is nothing to do.
pub inline fn rescale(comptime rows: usize, args: *const AccumulateArgs) void {
    inline for (0..rows) |r| if (args.corrections[r] != 1) {
        var column: usize = 0;
        while (column < args.dim) : (column += vec.lanes) {
            const at = args.outputs + r * args.output_stride + column;
            vec.store(at, vec.load(F, at) * vec.splat(args.corrections[r]));
        }
    };
}

fn accumulate_planes(
    comptime T: type,
    comptime rows: usize,
    comptime planes: usize,
    args: *const AccumulateArgs,
) void {
    @setEvalBranchQuota(100_000); // everything below is unrolled
    const groups = args.dim / format.group;
    const parts = parts_of_group(rows, planes);
    var spread = args.ahead.over(groups * (T.loads_per_group(.value) * parts + 1 + rows));
    const Rows = @Vector(rows, f32);
    const largest_weights: Rows = args.largest[0..rows].*;
    const slots = weight_slots(rows, args);
    // Weights of several groups before their dot products: their chains of operations overlap.
    var weights: [groups_at_once]Weights(rows, planes) = undefined;
    var first: usize = 0;
    while (first < groups) : (first += groups_at_once) {
        const count = @min(groups_at_once, groups - first);
        var of_scales: [groups_at_once]Slots = undefined;
        const units = scale_slots(T, args, first, count, &of_scales);
        for (0..count) |_| spread.turn();
        var shifts: [rows]u4 = @splat(0);
        if (T.bits <= 4) shifts = spare_bits(T, rows, &slots, &.of(of_scales[0..count]));
        const dropped = dropped_units(T, rows, planes, args.minor, &shifts);
        for (weights[0..count], of_scales[0..count], units[0..count]) |*w, *scale, unit| {
            split_products(T, rows, planes, &slots, scale, args.minor, &shifts, w, &spread);
            w.units = largest_weights * @as(Rows, @splat(unit)) * dropped;
        }
        for (weights[0..count], first..) |*w, g| {
            accumulate_group(T, rows, planes, args, g, w, &spread);
        }
    }
}

pub const groups_at_once = 4;
const Few = @Vector(groups_at_once, f32);

/// Slots of the weights of all rows.
pub inline fn weight_slots(comptime rows: usize, args: *const AccumulateArgs) [rows]Slots {
    const Rows = @Vector(rows, f32);
    const largest: Rows = args.largest[0..rows].*;
    const inverses: [rows]f32 = @as(Rows, @splat(weight_one)) /
        vec.max(largest, @as(Rows, @splat(tiny)));
    var slots: [rows]Slots = undefined;
    inline for (&slots, inverses, 0..) |*some, inverse, r| {
        var blocks: [format.blocks_per_page]F = undefined;
        inline for (&blocks, 0..) |*block, b| {
            block.* = vec.load(F, @as([*]const f32, &args.weights[r]) + b * vec.lanes);
        }
        some.* = to_slots(&blocks, inverse);
    }
    return slots;
}

/// Slots of the scales of `count` groups, and what their units are worth.
pub inline fn scale_slots(
    comptime T: type,
    args: *const AccumulateArgs,
    first: usize,
    count: usize,
    slots: *[groups_at_once]Slots,
) [groups_at_once]f32 {
    const scales = args.values + args.dim / format.group * T.group_bytes;
    const largest = largest_scales(T, args, scales, first, count);
    const factors: [groups_at_once]f32 =
        @as(Few, @splat(scale_one(T))) / @max(largest, @as(Few, @splat(tiny)));
    for (slots[0..count], first.., factors[0..count]) |*some, g, factor| {
        some.* = to_slots(&load_scales(T, scales, g), factor);
    }
    return largest * @as(Few, @splat(unit_one(T)));
}

/// What a unit of the weights of each row is worth more because low bits are dropped.
pub inline fn dropped_units(
    comptime T: type,
    comptime rows: usize,
    comptime planes: usize,
    minor: [*]const bool,
    shifts: *const [rows]u4,
) @Vector(rows, f32) {
    var dropped: [rows]f32 = @splat(1);
    inline for (&dropped, shifts, 0..) |*x, shift, r| {
        const alone = T.bits <= 4 and (planes == 1 or minor[r]);
        if (alone) x.* = @floatFromInt(@as(u32, 256) >> shift);
    }
    return dropped;
}

inline fn load_scales(comptime T: type, scales: [*]const u8, g: usize) [format.blocks_per_page]F {
    var blocks: [format.blocks_per_page]F = undefined;
    inline for (&blocks, 0..) |*block, b| {
        block.* = T.load_scales(scales, g * format.page_tokens + b * vec.lanes);
    }
    return blocks;
}

/// The largest magnitudes among the scales of `count` groups. What slots hold that are not seen
/// must not show in the bits.
inline fn largest_scales(
    comptime T: type,
    args: *const AccumulateArgs,
    scales: [*]const u8,
    first: usize,
    count: usize,
) Few {
    if (!args.any_hidden) {
        var ranks: [groups_at_once]U = @splat(@splat(0));
        inline for (&ranks, 0..) |*rank, i| if (i < count) {
            rank.* = T.scale_ranks(scales, (first + i) * format.page_tokens);
        };
        return T.scale_of_rank(groups_at_once, vec.fold_each(.max, U, groups_at_once, &ranks));
    }
    var maxima: [groups_at_once]F = @splat(vec.splat(0));
    inline for (&maxima, 0..) |*maximum, i| if (i < count) {
        var blocks = load_scales(T, scales, first + i);
        inline for (&blocks, 0..) |*block, b| {
            const bits = vec.load(U, @as([*]const f32, &args.weights[0]) + b * vec.lanes);
            const is_hidden = bits == @as(U, @splat(hidden_weight));
            block.* = @select(f32, is_hidden, vec.splat(0), block.*);
        }
        maximum.* = vec.max(
            vec.max(@abs(blocks[0]), @abs(blocks[1])),
            vec.max(@abs(blocks[2]), @abs(blocks[3])),
        );
    };
    return vec.fold_each(.max, F, groups_at_once, &maxima);
}

const hidden_weight: u32 = @bitCast(@as(f32, -0.0));

inline fn to_slots(blocks: *const [format.blocks_per_page]F, factor: f32) Slots {
    var bits: [format.blocks_per_page]U = undefined;
    inline for (blocks, &bits) |block, *integer| {
        integer.* = @bitCast(block * vec.splat(factor) + vec.splat(vec.round_magic));
    }
    return .{ dot.pair_halves(bits[0], bits[2]), dot.pair_halves(bits[1], bits[3]) };
}

inline fn multiply(a: *const Slots, b: *const Slots) Slots {
    return .{ dot.multiply_q15(a[0], b[0]), dot.multiply_q15(a[1], b[1]) };
}

/// Packs the products of a group into planes, and sums them where codes have an offset.
pub inline fn split_products(
    comptime T: type,
    comptime rows: usize,
    comptime planes: usize,
    slots: *const [rows]Slots,
    scale: *const Slots,
    minor: [*]const bool, // (row)
    shifts: *const [rows]u4,
    weights: *Weights(rows, planes),
    spread: *Spread,
) void {
    if (T.bits == 8) {
        const mask: dot.Halves = @splat(127);
        inline for (slots, 0..) |*row_slots, r| {
            spread.turn();
            // Neither weights nor scales are negative, so both planes are in [0, 127].
            const a, const b = multiply(row_slots, scale);
            vec.store(&weights.planes[0][r], dot.low_bytes(a >> @splat(7), b >> @splat(7)));
            vec.store(&weights.planes[1][r], dot.low_bytes(a & mask, b & mask));
        }
        return;
    }
    var sums: [rows]I = undefined;
    inline for (slots, 0..) |*row_slots, r| {
        spread.turn();
        const a, const b = multiply(row_slots, scale);
        const high = &weights.planes[0][r];
        const low = &weights.planes[planes - 1][r];
        if (T.bits <= 4 and (planes == 1 or minor[r])) {
            const shift = shifts[r];
            const words = dot.high_bytes(
                dot.shift_left(a, shift) +| dither[0],
                dot.shift_left(b, shift) +| dither[1],
            );
            if (planes == 2) vec.store(high, @as(U, @splat(0)));
            vec.store(low, words);
            sums[r] = dot.sum_bytes(words);
        } else {
            const half: dot.Halves = @splat(128);
            vec.store(high, dot.high_bytes(a +% half, b +% half));
            vec.store(low, dot.low_bytes(a, b));
            sums[r] = dot.sum_halves(a) +% dot.sum_halves(b);
        }
    }
    const totals = vec.fold_each(.add, I, rows, &sums);
    weights.biases = totals *% @as(@Vector(rows, i32), @splat(-T.offset));
}

/// The outermost slots of some groups' scales.
pub const Outer = struct {
    most: Slots,
    least: Slots,

    pub inline fn of(scales: []const Slots) Outer {
        var outer: Outer = .{ .most = scales[0], .least = scales[0] };
        for (scales[1..]) |*scale| inline for (&outer.most, &outer.least, scale) |*high, *low, x| {
            high.* = @max(high.*, x);
            low.* = @min(low.*, x);
        };
        return outer;
    }
};

/// By how many bits, up to 7, the products of each row fall short of 15: the largest weight and the
/// largest scale are seldom those of one token.
pub inline fn spare_bits(
    comptime T: type,
    comptime rows: usize,
    slots: *const [rows]Slots,
    outer: *const Outer,
) [rows]u4 {
    // Products grow with scales, as no weight is negative: the outermost ones of each slot will do.
    const zero: dot.Halves = @splat(0);
    var used: [rows]U = undefined;
    inline for (&used, slots) |*bits, *row_slots| {
        const of_most = multiply(row_slots, &outer.most);
        var magnitudes: dot.Halves = @max(of_most[0], of_most[1], zero);
        if (!T.half_levels) { // else no scale is negative
            const of_least = multiply(row_slots, &outer.least);
            // ~x has as many bits as the magnitude of a negative x.
            const low: dot.Halves = @min(of_least[0], of_least[1], ~zero);
            magnitudes |= ~low;
        }
        bits.* = @bitCast(magnitudes);
    }
    const joined: [rows]u32 = vec.fold_each(.join, U, rows, &used);
    var spare: [rows]u4 = undefined;
    inline for (&spare, joined) |*bits, both| {
        const halves = (both | both >> 16) & 0x7fff;
        bits.* = @intCast(@clz(halves | 0x80) - 17);
    }
    return spare;
}

/// What is added before the low eight bits are dropped: instead of one half for all, every slot has
/// its own of 64 fractions between 1/8 and 7/8, so that weights too small for one unit keep their
/// sum, nearly, and others are rounded to one of their neighbours, mostly the nearest.
const dither: Slots = blk: {
    var result: [2][32]i16 = undefined;
    for (0..format.page_tokens) |slot| {
        const lane = slot % 16 * 2 + slot / 32;
        const fraction: i16 = @bitReverse(@as(u6, @intCast(slot)));
        result[slot / 16 % 2][lane] = 32 + fraction * 3 + 1;
    }
    break :blk .{ result[0], result[1] };
};

/// As many rows and halves of a group at a time as there is room for.
inline fn accumulate_group(
    comptime T: type,
    comptime rows: usize,
    comptime planes: usize,
    args: *const AccumulateArgs,
    g: usize,
    weights: *const Weights(rows, planes),
    spread: *Spread,
) void {
    const shape = comptime shape_of_parts(rows, planes);
    const passes = comptime std.math.divCeil(usize, rows, shape.rows) catch unreachable;
    inline for (0..passes) |pass| {
        inline for (0..halves_of_group / shape.halves) |part| {
            accumulate_part(T, rows, planes, .{
                .row = pass * shape.rows,
                .rows = comptime @min(shape.rows, rows - pass * shape.rows),
                .half = part * shape.halves,
                .halves = shape.halves,
            }, args, g, weights, spread);
        }
    }
}

const halves_of_group = format.group / vec.lanes;
const Shape = struct { rows: usize, halves: usize };

/// Rows and halves of a group that there is room for at a time.
fn shape_of_parts(rows: usize, planes: usize) Shape {
    const room = dot.accumulators_max / planes;
    const halves = if (vec.wide_registers) halves_of_group else 1;
    return .{ .rows = @min(rows, @max(1, room / halves)), .halves = halves };
}

fn parts_of_group(rows: usize, planes: usize) usize {
    const shape = shape_of_parts(rows, planes);
    return (halves_of_group / shape.halves) * ((rows + shape.rows - 1) / shape.rows);
}

/// Rows of a block and halves of a group.
const Part = struct { row: usize, rows: usize, half: usize, halves: usize };

inline fn accumulate_part(
    comptime T: type,
    comptime rows: usize,
    comptime planes: usize,
    comptime part: Part,
    args: *const AccumulateArgs,
    g: usize,
    weights: *const Weights(rows, planes),
    spread: *Spread,
) void {
    @setEvalBranchQuota(100_000); // everything below is unrolled
    const loads = T.loads_per_group(.value);
    var sums: [planes][part.rows][part.halves]dot.Accumulator = undefined;
    inline for (0..part.rows) |r| inline for (0..part.halves) |h| {
        const start = if (T.offset != 0 and !T.half_levels) weights.biases[part.row + r] else 0;
        sums[planes - 1][r][h] = .init(start);
        if (planes == 2) sums[0][r][h] = .init(0);
    };
    for (0..loads) |l| {
        const of_group = args.values + g * T.group_bytes;
        spread.turn();
        var codes: [part.halves]T.Loaded = undefined;
        inline for (&codes, part.half..) |*some, h| some.* = .init(.value, of_group, l, h * 64);
        inline for (0..T.chunks_per_load) |which| {
            const quad = l * T.chunks_per_load + which;
            inline for (0..part.rows) |r| inline for (0..planes) |p| {
                const word = weights.planes[p][part.row + r][quad];
                inline for (0..part.halves) |h| if (T.bits == 8) {
                    sums[p][r][h].dot_signed(codes[h].select(which), word);
                } else sums[p][r][h].dot(codes[h].select(which), word);
            };
        }
    }
    inline for (0..part.rows) |i| inline for (0..part.halves) |h| {
        const r = part.row + i;
        var sum = sums[0][i][h].get();
        if (planes == 2) sum = (sum << @splat(low_bits(T))) +% sums[1][i][h].get();
        if (T.half_levels) sum = (sum << @splat(1)) +% @as(I, @splat(weights.biases[r]));
        const column = g * format.group + (part.half + h) * vec.lanes;
        const at = args.outputs + r * args.output_stride + column;
        vec.store(at, vec.load(F, at) + @as(F, @floatFromInt(sum)) * vec.splat(weights.units[r]));
    };
}
