//! The kernel table: everything that is compiled once per instruction set, as function pointers.
//! Its functions are generic over the formats in `format.all` and over the number of query rows.
//! Filled by isa.zig, picked by dispatch.zig, called by attend.zig, block.zig, step.zig, input.zig
//! and fill.zig.
const format = @import("format.zig");
const prepare = @import("prepare.zig");
const score = @import("score.zig");
const softmax = @import("softmax.zig");
const accumulate = @import("accumulate.zig");
const encode = @import("encode.zig");
const encode_k = @import("encode_k.zig");
const rotate = @import("rotate.zig");
const rows_file = @import("rows.zig");
const tile = @import("tile.zig");
const tile_values = @import("tile_values.zig");

/// Sizes of row blocks that have kernels of their own.
pub const row_counts = [_]usize{ 1, 2, 3, 4 };

pub const ScoreFn = *const fn (*const score.ScoreArgs) callconv(.c) void;
pub const AccumulateFn = *const fn (*const accumulate.AccumulateArgs) callconv(.c) void;
pub const KeysFn = *const fn (*const tile.KeysArgs) callconv(.c) void;
pub const LayOutFn = *const fn (*const tile_values.LayOutArgs) callconv(.c) void;
pub const AccumulateRowsFn = *const fn (*const tile_values.ValuesArgs) callconv(.c) void;
pub const PageFn = *const fn (*const encode.PageArgs) callconv(.c) void;
pub const PackFn = *const fn (*const encode.PackArgs) callconv(.c) bool;
pub const StoreFn = *const fn (*const rows_file.StoreArgs) callconv(.c) bool;

pub const Table = extern struct {
    prepare: [format.count]*const fn (*const prepare.PrepareArgs) callconv(.c) void,
    score: [format.count][row_counts.len]ScoreFn,
    adjust: *const fn (*const softmax.AdjustArgs) callconv(.c) void,
    update: *const fn (*const softmax.UpdateArgs) callconv(.c) void,
    add_mass: *const fn (*const softmax.MassArgs) callconv(.c) void,
    accumulate: [format.count][row_counts.len]AccumulateFn,
    /// For many rows; floating-point formats only.
    lay_out_keys: [format.count]?KeysFn,
    score_rows: *const fn (*const tile.ScoreArgs) callconv(.c) void,
    accumulate_rows: *const fn (*const tile.ValuesArgs) callconv(.c) void,
    /// For many rows; quantized formats only, and not for all instruction sets. The first one is of
    /// no use to q8.
    lay_out_values: [format.count]?LayOutFn,
    accumulate_packed: [format.count]?AccumulateRowsFn,
    /// Quantized formats only.
    encode_keys: [format.count]?PageFn,
    encode_values: [format.count]?PageFn,
    /// Those of them whose pages have no offsets, nor scales that are fitted.
    pack_keys: [format.count]?PackFn,
    pack_values: [format.count]?PackFn,
    store_offsets: *const fn (*const encode_k.OffsetArgs) callconv(.c) void,
    subtract_offsets: *const fn (*const encode_k.OffsetArgs) callconv(.c) void,
    /// Floating-point formats only.
    store: [format.count]?StoreFn,
    rotate: *const fn ([*]f32, usize) callconv(.c) void,
    check: *const fn (*const rows_file.CheckArgs) callconv(.c) bool,
    read: *const fn (*const rows_file.ReadArgs) callconv(.c) bool,
};

pub const table: Table = fill();

fn fill() Table {
    var t: Table = undefined;
    t.adjust = &adapt(softmax.AdjustArgs, void, softmax.adjust).call;
    t.update = &adapt(softmax.UpdateArgs, void, softmax.update).call;
    t.add_mass = &adapt(softmax.MassArgs, void, softmax.add_mass).call;
    t.score_rows = &adapt(tile.ScoreArgs, void, tile.score_rows).call;
    t.accumulate_rows = &adapt(tile.ValuesArgs, void, tile.accumulate_rows).call;
    t.store_offsets = &adapt(encode_k.OffsetArgs, void, encode_k.store_offsets).call;
    t.subtract_offsets = &adapt(encode_k.OffsetArgs, void, encode_k.subtract_offsets).call;
    t.rotate = &rotate_row;
    t.check = &adapt(rows_file.CheckArgs, bool, rows_file.check).call;
    t.read = &adapt(rows_file.ReadArgs, bool, rows_file.read).call;
    for (format.all, 0..) |T, f| {
        t.prepare[f] = &struct {
            fn call(args: *const prepare.PrepareArgs) callconv(.c) void {
                prepare.prepare(T, args);
            }
        }.call;
        for (row_counts, 0..) |rows, r| {
            t.score[f][r] = &struct {
                fn call(args: *const score.ScoreArgs) callconv(.c) void {
                    score.score(T, rows, args);
                }
            }.call;
            t.accumulate[f][r] = &struct {
                fn call(args: *const accumulate.AccumulateArgs) callconv(.c) void {
                    accumulate.accumulate(T, rows, args);
                }
            }.call;
        }
        t.encode_keys[f] = if (T.quantized) &page_encoder(T, .key).call else null;
        t.encode_values[f] = if (T.quantized) &page_encoder(T, .value).call else null;
        const packs = T.quantized and !T.half_levels;
        t.pack_keys[f] = if (packs) &page_packer(T, .key).call else null;
        t.pack_values[f] = if (packs) &page_packer(T, .value).call else null;
        t.lay_out_keys[f] = if (T.quantized) null else &struct {
            fn call(args: *const tile.KeysArgs) callconv(.c) void {
                tile.lay_out_keys(T, args);
            }
        }.call;
        const worthwhile = T.quantized and tile_values.worthwhile;
        t.lay_out_values[f] = if (worthwhile and T.bits < 8) &struct {
            fn call(args: *const tile_values.LayOutArgs) callconv(.c) void {
                tile_values.lay_out_values(T, args);
            }
        }.call else null;
        t.accumulate_packed[f] = if (worthwhile) &struct {
            fn call(args: *const tile_values.ValuesArgs) callconv(.c) void {
                tile_values.accumulate_rows(T, args);
            }
        }.call else null;
        t.store[f] = if (T.quantized) null else &struct {
            fn call(args: *const rows_file.StoreArgs) callconv(.c) bool {
                return rows_file.store(T, args);
            }
        }.call;
    }
    return t;
}

fn adapt(
    comptime Args: type,
    comptime Result: type,
    comptime function: fn (*const Args) Result,
) type {
    return struct {
        fn call(args: *const Args) callconv(.c) Result {
            return function(args);
        }
    };
}

fn page_encoder(comptime T: type, comptime side: format.Side) type {
    return struct {
        fn call(args: *const encode.PageArgs) callconv(.c) void {
            encode.encode_page(T, side, args);
        }
    };
}

fn page_packer(comptime T: type, comptime side: format.Side) type {
    return struct {
        fn call(args: *const encode.PackArgs) callconv(.c) bool {
            return encode.pack_page(T, side, args);
        }
    };
}

fn rotate_row(row: [*]f32, len: usize) callconv(.c) void {
    rotate.rotate(row[0..len]);
}
