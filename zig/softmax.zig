//! Between keys and values: what a model adds to its logits (softcap, ALiBi, masks, visibility),
//! and the running softmax over pages. Called by step.zig through the kernel table.
const std = @import("std");
const vec = @import("vec.zig");
const exp2_file = @import("exp2.zig");
const exp2 = exp2_file.exp2;
const format = @import("format.zig");
const score = @import("score.zig");
const ahead_file = @import("ahead.zig");
const Ahead = ahead_file.Ahead;
const Spread = ahead_file.Spread;
const F = vec.F;
const I = vec.I;

/// Logits that nothing sees; far below any real one, and finite.
pub const hidden: f32 = -1e30;
pub const log2_e: f32 = 1.4426950408889634;

/// How the scores of a block of rows become logits in units of log2.
pub const AdjustArgs = extern struct {
    scores: *align(64) score.Scores,
    rows: usize,
    /// Slots that each row sees: [first, end).
    first: [score.rows_max]u32,
    end: [score.rows_max]u32,
    /// 0 for none; else softcap * log2(e), and scores arrive as 2 * log2(e) / softcap * logit.
    softcap: f32,
    /// 1 when `slopes` and `distances` are to be used.
    alibi: u32,
    /// log2(e) * slope of each row, and key position minus query position at slot 0.
    slopes: [score.rows_max]f32,
    distances: [score.rows_max]i64,
    /// abi.MaskKind, and per row the mask entry of slot 0 (only seen slots are read).
    mask_kind: u32,
    masks: [score.rows_max]usize,
};

pub fn adjust(args: *const AdjustArgs) void {
    for (0..args.rows) |r| {
        const scores: [*]f32 = &args.scores[r];
        if (args.softcap != 0) for (0..format.blocks_per_page) |b| {
            vec.store(scores + b * 16, cap(vec.load(F, scores + b * 16), args.softcap));
        };
        if (args.alibi != 0) for (0..format.blocks_per_page) |b| {
            const offset: i32 = @intCast(std.math.clamp(args.distances[r], -(1 << 30), 1 << 30));
            const distance = std.simd.iota(i32, 16) + @as(
                I,
                @splat(offset + @as(i32, @intCast(b * 16))),
            );
            const bias = @as(F, @floatFromInt(distance)) * vec.splat(args.slopes[r]);
            vec.store(scores + b * 16, vec.load(F, scores + b * 16) + bias);
        };
        if (args.mask_kind != 0) apply_mask(args, r);
        for (0..format.blocks_per_page) |b| {
            const seen = vec.lanes_within(b * 16, args.first[r], args.end[r]);
            vec.store(
                scores + b * 16,
                @select(f32, seen, vec.load(F, scores + b * 16), vec.splat(hidden)),
            );
        }
    }
}

/// softcap * log2(e) * tanh, of scores given as 2 * log2(e) times tanh's argument.
fn cap(x: F, softcap: f32) F {
    const e = exp2(16, -@abs(x));
    const tanh = (vec.splat(1) - e) / (vec.splat(1) + e);
    const signed = @select(f32, x < vec.splat(0), -tanh, tanh);
    return signed * vec.splat(softcap);
}

fn apply_mask(args: *const AdjustArgs, row: usize) void {
    const scores = &args.scores[row];
    for (args.first[row]..args.end[row]) |slot| {
        if (args.mask_kind == 1) {
            const mask: [*]const u8 = @ptrFromInt(args.masks[row] +% slot);
            if (mask[0] == 0) scores[slot] = hidden;
        } else {
            const bias: *align(1) const f32 = @ptrFromInt(args.masks[row] +% slot * 4);
            // -inf hides a token; the sum must stay above the sentinel of an untouched row.
            scores[slot] = @max(scores[slot] + bias.* * log2_e, hidden);
        }
    }
}

/// The running softmax of a block of rows: largest logit so far, and sums of weights in 16 lanes.
pub const Running = extern struct {
    top: [*]f32, // (row)
    sums: [*]f32, // (row, 16)
};

pub const UpdateArgs = extern struct {
    scores: *align(64) score.Scores, // in: logits; out: weights
    rows: usize,
    ahead: Ahead,
    running: Running,
    /// in: whether some slot may be hidden; out: whether one is. Their weights are negative zeros.
    any_hidden: *bool,
    /// out: what the outputs so far shrink by, the largest weight of each row, and whether that is
    /// below `minor_part` of the row's sum so far
    corrections: *[score.rows_max]f32,
    largest: *[score.rows_max]f32,
    minor: *[score.rows_max]bool,
};

/// A token is a minor one while its weight is at most this part of the sum over its row so far.
const minor_part: f32 = 1.0 / 16.0;

/// Replaces logits by weights relative to the largest logit so far, and tells by how much the
/// outputs so far shrink.
pub fn update(args: *const UpdateArgs) void {
    switch (args.rows) {
        inline 1...score.rows_max => |rows| update_rows(rows, args),
        else => unreachable, // step.zig
    }
}

fn update_rows(comptime rows: usize, args: *const UpdateArgs) void {
    @setEvalBranchQuota(10_000); // everything below is unrolled
    var update_of: Update(rows) = undefined;
    update_of.begin(args);
    inline for (0..rows) |r| update_of.weigh(r);
    update_of.finish();
}

/// An update in parts, between which something else can be computed.
pub fn Update(comptime rows: usize) type {
    return struct {
        args: UpdateArgs,
        spread: Spread,
        hides: bool,
        tops: [rows]f32,
        largest: Rows,
        sums: [rows]F,

        const Rows = @Vector(rows, f32);

        pub inline fn begin(self: *@This(), args: *const UpdateArgs) void {
            self.args = args.*;
            self.spread = args.ahead.over(rows * format.blocks_per_page);
            var maxima: [rows]F = undefined;
            inline for (&maxima, 0..) |*maximum, r| {
                const logits: [*]const f32 = &args.scores[r];
                maximum.* = vec.max(
                    vec.max(vec.load(F, logits), vec.load(F, logits + 16)),
                    vec.max(vec.load(F, logits + 32), vec.load(F, logits + 48)),
                );
            }
            const largest = vec.fold_each(.max, F, rows, &maxima);
            const before: Rows = args.running.top[0..rows].*;
            // A row that has seen nothing keeps a top far above `hidden`, so that hidden weights
            // are zero.
            const top = vec.max(before, vec.max(largest, @as(Rows, @splat(hidden / 10))));
            if (args.any_hidden.*) args.any_hidden.* = sees_hidden(rows, args.scores);
            self.hides = args.any_hidden.*;
            const corrections: [rows]f32 = exp2(rows, before - top);
            self.largest = exp2(rows, largest - top);
            self.tops = top;
            // Stored before the weights are made, so that nothing of this waits until they are.
            args.running.top[0..rows].* = self.tops;
            args.corrections[0..rows].* = corrections;
            args.largest[0..rows].* = self.largest;
            inline for (0..rows) |r| {
                const lanes = args.running.sums + r * vec.lanes;
                vec.store(lanes, vec.load(F, lanes) * vec.splat(corrections[r]));
            }
        }

        /// Makes weights of the logits of row `r`.
        pub inline fn weigh(self: *@This(), r: usize) void {
            const sums = self.args.running.sums + r * vec.lanes;
            const scores = &self.args.scores[r];
            self.sums[r] = make_weights(scores, self.tops[r], self.hides, sums, &self.spread);
        }

        /// The same, block after block, of a row that sees all slots.
        pub inline fn weigh_block(self: *@This(), r: usize, b: usize, sum: *F) void {
            const sums = self.args.running.sums + r * vec.lanes;
            const scores = @as([*]f32, &self.args.scores[r]) + b * vec.lanes;
            if (b == 0) sum.* = vec.load(F, sums);
            sum.* += weigh_some(1, scores, self.tops[r], false, &self.spread)[0];
            if (b + 1 < format.blocks_per_page) return;
            vec.store(sums, sum.*);
            self.sums[r] = sum.*;
        }

        pub inline fn finish(self: *const @This()) void {
            const totals: Rows = vec.fold_each(.add, F, rows, &self.sums);
            const is_minor = self.largest <= totals * @as(Rows, @splat(minor_part));
            const minor: @Vector(rows, u8) = @intFromBool(is_minor);
            @as(*[rows]u8, @ptrCast(self.args.minor)).* = minor;
        }
    };
}

/// Of a row; adds them to its sums.
inline fn make_weights(
    scores: [*]f32,
    top: f32,
    hides: bool,
    sums: [*]f32,
    spread: *Spread,
) F {
    const together = exp2_file.together;
    var sum = vec.load(F, sums);
    comptime var first = 0;
    inline while (first < format.blocks_per_page) : (first += together) {
        const weights = weigh_some(together, scores + first * vec.lanes, top, hides, spread);
        inline for (weights) |weight| sum += weight;
    }
    vec.store(sums, sum);
    return sum;
}

/// Of `count` blocks of 16 slots. Returns them as they are to be added up.
inline fn weigh_some(
    comptime count: usize,
    scores: [*]f32,
    top: f32,
    hides: bool,
    spread: *Spread,
) [count]F {
    var logits: [count]F = undefined;
    var offsets: [count]F = undefined;
    inline for (&logits, &offsets, 0..) |*logit, *offset, b| {
        spread.turn();
        logit.* = vec.load(F, scores + b * vec.lanes);
        offset.* = logit.* - vec.splat(top);
    }
    const weights = exp2_file.exp2_each(vec.lanes, count, &offsets);
    var stored = weights;
    if (hides) inline for (&stored, logits) |*weight, logit| {
        weight.* = @select(f32, is_hidden(logit), vec.splat(-0.0), weight.*);
    };
    inline for (stored, 0..) |weight, b| vec.store(scores + b * vec.lanes, weight);
    return weights;
}

inline fn is_hidden(logits: F) @Vector(vec.lanes, bool) {
    return logits <= vec.splat(hidden / 10);
}

fn sees_hidden(comptime rows: usize, all: *const score.Scores) bool {
    var lowest = vec.splat(0);
    for (all[0..rows]) |*scores| for (0..format.blocks_per_page) |b| {
        lowest = vec.min(lowest, vec.load(F, @as([*]const f32, scores) + b * 16));
    };
    return @reduce(.Or, is_hidden(lowest));
}

/// Probabilities of a block of rows, given their final top and total, added to `mass`.
pub const MassArgs = extern struct {
    scores: *align(64) const score.Scores,
    rows: usize,
    top: [*]const f32, // (row)
    total: [*]const f32, // (row)
    first: [score.rows_max]u32,
    end: [score.rows_max]u32,
    /// Per row the mass of slot 0's token; only seen slots are written.
    mass: [score.rows_max]usize,
};

pub fn add_mass(args: *const MassArgs) void {
    for (0..args.rows) |r| {
        if (args.total[r] == 0) continue;
        for (args.first[r]..args.end[r]) |slot| {
            const weight = exp2(1, .{args.scores[r][slot] - args.top[r]})[0];
            const mass: *align(1) f32 = @ptrFromInt(args.mass[r] +% slot * 4);
            mass.* += weight / args.total[r];
        }
    }
}
