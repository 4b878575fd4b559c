//! Between keys and values: what a model adds to its logits (softcap, ALiBi, masks, visibility),
//! and the running softmax over pages. Called by step.zig through the kernel table.
const std = @import("std");
const vec = @import("vec.zig");
const exp2 = @import("exp2.zig").exp2;
const format = @import("format.zig");
const score = @import("score.zig");
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
        const first: I = @splat(@intCast(args.first[r]));
        const end: I = @splat(@intCast(args.end[r]));
        for (0..format.blocks_per_page) |b| {
            const slot = std.simd.iota(i32, 16) + @as(I, @splat(@intCast(b * 16)));
            const seen = @select(
                bool,
                slot >= first,
                slot < end,
                @as(@Vector(16, bool), @splat(false)),
            );
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
    running: Running,
    corrections: *[score.rows_max]f32,
};

/// Replaces logits by weights relative to the largest logit so far, and tells by how much the
/// outputs so far shrink.
pub fn update(args: *const UpdateArgs) void {
    for (0..args.rows) |r| {
        const scores: [*]f32 = &args.scores[r];
        var logits: [format.blocks_per_page]F = undefined;
        for (&logits, 0..) |*logit, b| logit.* = vec.load(F, scores + b * 16);
        const largest = vec.reduce(
            .max,
            vec.max(vec.max(logits[0], logits[1]), vec.max(logits[2], logits[3])),
        );
        const before = args.running.top[r];
        // A row that has seen nothing keeps a top far above `hidden`, so that hidden weights are
        // zero.
        const top = @max(before, @max(largest, hidden / 10));
        const correction = exp2(1, .{before - top})[0];
        const sums = args.running.sums + r * vec.lanes;
        var sum = vec.load(F, sums) * vec.splat(correction);
        for (logits, 0..) |logit, b| {
            const weight = exp2(16, logit - vec.splat(top));
            vec.store(scores + b * 16, weight);
            sum += weight;
        }
        vec.store(sums, sum);
        args.running.top[r] = top;
        args.corrections[r] = correction;
    }
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
