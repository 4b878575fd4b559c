//! Many query rows against one window of quantized values, as in a prefill. Weights and sums are
//! those of softmax.zig and accumulate.zig, bit by bit; what differs is that all rows share what
//! depends on the values alone, and that dot products, what they need, and the softmax of other
//! rows are computed at the same time. Called by block.zig and window.zig through the kernel table.
const std = @import("std");
const accumulate_file = @import("accumulate.zig");
const dot = @import("dot.zig");
const format = @import("format.zig");
const score = @import("score.zig");
const softmax = @import("softmax.zig");
const vec = @import("vec.zig");
const ahead_file = @import("ahead.zig");
const Ahead = ahead_file.Ahead;
const Spread = ahead_file.Spread;
const AccumulateArgs = accumulate_file.AccumulateArgs;
const F = vec.F;
const I = vec.I;

/// Elsewhere the dot products leave nothing idle.
pub const worthwhile = vec.wide_registers;

/// Rows of a block.
const rows = score.rows_max;
pub const blocks_max = 16;
const value_words = format.block_slots;
/// Bytes of a group's codes and of a word of them, laid out.
const group_bytes = format.group * format.page_tokens;
const word_bytes = format.group * 4;
const halves = format.group / vec.lanes;

pub const LayOutArgs = extern struct {
    /// As they are packed.
    values: [*]const u8,
    dim: usize,
    target: [*]u8,
};

/// Codes of values as `accumulate_rows` reads them: (group, word, dimension, 4).
pub fn lay_out_values(comptime T: type, args: *const LayOutArgs) void {
    const loads = T.loads_per_group(.value);
    const groups = args.dim / format.group;
    for (0..groups) |g| for (0..loads) |l| {
        const target = args.target + g * group_bytes + l * T.chunks_per_load * word_bytes;
        inline for (0..halves) |h| {
            const loaded: T.Loaded = .init(.value, args.values + g * T.group_bytes, l, h * 64);
            inline for (0..T.chunks_per_load) |which| {
                vec.store(target + which * word_bytes + h * 64, loaded.select(which));
            }
        }
    };
}

pub const ValuesArgs = extern struct {
    /// As they are packed.
    values: [*]const u8,
    /// From `lay_out_values`; q8 has nothing to lay out.
    codes: [*]const u8,
    /// Dimensions as stored.
    dim: usize,
    ahead_of_update: Ahead,
    ahead: Ahead,
    /// Blocks of four rows, all of which see the whole window.
    count: usize,
    /// (row, slot): logits, then weights
    scores: [*]align(64) [format.page_tokens]f32,
    running: softmax.Running,
    /// (row, output_stride)
    outputs: [*]f32,
    output_stride: usize,
};

pub fn accumulate_rows(comptime T: type, args: *const ValuesArgs) void {
    const groups = args.dim / format.group;
    var some: Some(T) = undefined;
    some.args = args;
    some.no_hidden = false;
    some.spread = args.ahead.over(args.count * groups * rows);
    some.update_rows(0);
    some.first = 0;
    while (some.first < groups) : (some.first += groups_at_once) {
        some.count = @min(groups_at_once, groups - some.first);
        some.make_scales();
        for (0..args.count) |block| {
            if (some.first == 0) some.rescale(block);
            const minor: @Vector(rows, bool) = some.minor[block * rows ..][0..rows].*;
            if (T.bits <= 4 and @reduce(.And, minor)) {
                some.accumulate_block(1, block);
            } else some.accumulate_block(2, block);
        }
    }
}

const groups_at_once = accumulate_file.groups_at_once;

comptime {
    // A row gets its weights during a group, a block of them after each quarter of it.
    std.debug.assert(groups_at_once == rows and value_words % format.blocks_per_page == 0);
}

/// Some groups of the values.
fn Some(comptime T: type) type {
    return struct {
        args: *const ValuesArgs,
        spread: Spread,
        first: usize,
        count: usize,
        /// What accumulate.zig makes of their scales, which is the same for all rows.
        scales: [groups_at_once]accumulate_file.Slots,
        units: [groups_at_once]f32,
        outer: accumulate_file.Outer,
        // Of each row.
        corrections: [blocks_max * rows]f32,
        largest: [blocks_max * rows]f32,
        minor: [blocks_max * rows]bool,
        no_hidden: bool,

        const Self = @This();
        const Rows = @Vector(rows, f32);

        fn make_scales(some: *Self) void {
            const any = some.of_block(0);
            some.units = accumulate_file.scale_slots(T, &any, some.first, some.count, &some.scales);
            if (T.bits <= 4) some.outer = .of(some.scales[0..some.count]);
        }

        fn of_block(some: *const Self, block: usize) AccumulateArgs {
            const args = some.args;
            const row = block * rows;
            return .{
                .values = args.values,
                .ahead = .none,
                .dim = args.dim,
                .first_slot = 0,
                .end_slot = format.page_tokens,
                .weights = args.scores + row,
                .any_hidden = false,
                .largest = some.largest[row..].ptr,
                .minor = some.minor[row..].ptr,
                .corrections = some.corrections[row..].ptr,
                .outputs = args.outputs + row * args.output_stride,
                .output_stride = args.output_stride,
            };
        }

        fn update_args(some: *Self, block: usize) softmax.UpdateArgs {
            const args = some.args;
            const row = block * rows;
            return .{
                .scores = args.scores[row..][0..rows],
                .rows = rows,
                .ahead = args.ahead_of_update.part(block, 1, args.count),
                .running = .{
                    .top = args.running.top + row,
                    .sums = args.running.sums + row * vec.lanes,
                },
                .any_hidden = &some.no_hidden,
                .corrections = some.corrections[row..][0..rows],
                .largest = some.largest[row..][0..rows],
                .minor = some.minor[row..][0..rows],
            };
        }

        fn update_rows(some: *Self, block: usize) void {
            softmax.update(&some.update_args(block));
        }

        fn rescale(some: *const Self, block: usize) void {
            const corrections: Rows = some.corrections[block * rows ..][0..rows].*;
            if (@reduce(.And, corrections == @as(Rows, @splat(1)))) return;
            @call(.never_inline, rescale_block, .{some.of_block(block)});
        }

        fn rescale_block(args: AccumulateArgs) void {
            accumulate_file.rescale(rows, &args);
        }

        /// What the dot products leave idle makes weights of the next block's logits.
        fn accumulate_block(some: *Self, comptime planes: usize, block: usize) void {
            @setEvalBranchQuota(100_000); // what is called is unrolled
            const args = some.of_block(block);
            const slots = accumulate_file.weight_slots(rows, &args);
            var shifts: [rows]u4 = @splat(0);
            if (T.bits <= 4) shifts = accumulate_file.spare_bits(T, rows, &slots, &some.outer);
            const dropped = accumulate_file.dropped_units(T, rows, planes, args.minor, &shifts);
            const largest: Rows = args.largest[0..rows].*;
            const weighs = some.first == 0 and block + 1 < some.args.count;
            var update: softmax.Update(rows) = undefined;
            var weights: [2]accumulate_file.Weights(rows, planes) = undefined;
            for (0..some.count + 1) |next| {
                // Products of a group are made while the one before is summed up.
                if (next < some.count) {
                    const w = &weights[next % 2];
                    accumulate_file.split_products(
                        T,
                        rows,
                        planes,
                        &slots,
                        &some.scales[next],
                        args.minor,
                        &shifts,
                        w,
                        &some.spread,
                    );
                    w.units = largest * @as(Rows, @splat(some.units[next])) * dropped;
                }
                if (next == 0) continue;
                if (next == 1 and weighs) update.begin(&some.update_args(block + 1));
                const g = some.first + next - 1;
                accumulate_group(T, planes, &weights[(next - 1) % 2], &.{
                    .codes = some.args.codes + g * group_bytes,
                    .outputs = args.outputs + g * format.group,
                    .output_stride = args.output_stride,
                    .update = if (weighs) &update else null,
                    .turn = next - 1,
                });
            }
            if (!weighs) return;
            for (some.count..rows) |r| update.weigh(r);
            update.finish();
        }
    };
}

const Target = struct {
    codes: [*]const u8,
    outputs: [*]f32,
    output_stride: usize,
    /// A row of other rows is weighed meanwhile.
    update: ?*softmax.Update(rows),
    turn: usize,
};

inline fn accumulate_group(
    comptime T: type,
    comptime planes: usize,
    weights: *const accumulate_file.Weights(rows, planes),
    target: *const Target,
) void {
    @setEvalBranchQuota(100_000); // everything below is unrolled
    var sums: [planes][rows][halves]dot.Accumulator = undefined;
    inline for (0..rows) |r| {
        const start = if (T.offset != 0 and !T.half_levels) weights.biases[r] else 0;
        if (planes == 2) sums[0][r] = @splat(.init(0));
        sums[planes - 1][r] = @splat(.init(start));
    }
    var weighed: F = undefined;
    const quarter = value_words / format.blocks_per_page;
    for (0..format.blocks_per_page) |b| {
        inline for (0..quarter) |within| {
            const word = b * quarter + within;
            var codes: [halves]dot.Codes = undefined;
            inline for (&codes, 0..) |*some, h| {
                some.* = vec.load(dot.Codes, target.codes + word * word_bytes + h * 64);
            }
            inline for (0..rows) |r| inline for (0..planes) |p| {
                const y = weights.planes[p][r][word];
                inline for (&sums[p][r], codes) |*sum, some| {
                    if (T.bits == 8) sum.dot_signed(some, y) else sum.dot(some, y);
                }
            };
        }
        if (target.update) |update| update.weigh_block(target.turn, b, &weighed);
    }
    inline for (0..rows) |r| inline for (0..halves) |h| {
        var sum = sums[0][r][h].get();
        const low_bits = accumulate_file.low_bits(T);
        if (planes == 2) sum = (sum << @splat(low_bits)) +% sums[1][r][h].get();
        if (T.half_levels) sum = (sum << @splat(1)) +% @as(I, @splat(weights.biases[r]));
        const at = target.outputs + r * target.output_stride + h * vec.lanes;
        vec.store(at, vec.load(F, at) + @as(F, @floatFromInt(sum)) * vec.splat(weights.units[r]));
    };
}

test "many rows have the bits of few" {
    var prng = std.Random.DefaultPrng.init(9);
    inline for (.{ format.Q8, format.Q4, format.Q6K }) |T| inline for (.{ 32, 160 }) |dim| {
        const all = 3 * rows;
        const groups = dim / format.group;
        const code_bytes = groups * T.group_bytes;
        var page: [code_bytes + groups * format.page_tokens * @sizeOf(T.Scale)]u8 = undefined;
        for (page[0..code_bytes]) |*code| code.* = prng.random().uintAtMost(u8, 126);
        for (page[code_bytes..], 0..) |*byte, i| {
            const low = T.Scale == f16 and i % 2 == 0;
            byte.* = if (low) prng.random().int(u8) else prng.random().intRangeAtMost(u8, 40, 60);
        }
        var codes: [groups * group_bytes]u8 = undefined;
        lay_out_values(T, &.{ .values = &page, .dim = dim, .target = &codes });
        var scores: [2][all][format.page_tokens]f32 align(64) = undefined;
        var tops: [2][all]f32 = @splat(@splat(0.5));
        var sums: [2][all * vec.lanes]f32 = @splat(@splat(1));
        var outputs: [2][all * dim]f32 = @splat(@splat(2));
        for (&scores[0]) |*row| for (row) |*x| {
            x.* = prng.random().floatNorm(f32);
        };
        scores[1] = scores[0];
        const args: ValuesArgs = .{
            .values = &page,
            .codes = &codes,
            .dim = dim,
            .ahead_of_update = .none,
            .ahead = .none,
            .count = all / rows,
            .scores = &scores[0],
            .running = .{ .top = &tops[0], .sums = &sums[0] },
            .outputs = &outputs[0],
            .output_stride = dim,
        };
        accumulate_rows(T, &args);
        var few: Some(T) = undefined;
        few.no_hidden = false;
        var of_few = args;
        of_few.scores = &scores[1];
        of_few.running = .{ .top = &tops[1], .sums = &sums[1] };
        of_few.outputs = &outputs[1];
        few.args = &of_few;
        for (0..args.count) |block| {
            softmax.update(&few.update_args(block));
            accumulate_file.accumulate(T, rows, &few.of_block(block));
        }
        try std.testing.expectEqual(tops[1], tops[0]);
        try std.testing.expectEqual(sums[1], sums[0]);
        try std.testing.expectEqual(outputs[1], outputs[0]);
    };
}
