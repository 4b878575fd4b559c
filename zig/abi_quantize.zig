//! The part of the C ABI that quantizes by itself: rows of `dim` f32, packed as key pages of 64
//! rows. Exported by abi.zig; calls quantize.zig.
const abi = @import("abi.zig");
const config_file = @import("config.zig");
const format = @import("format.zig");
const gpa = @import("memory.zig").gpa;
const input_file = @import("input.zig");
const message = @import("message.zig");
const quantize_file = @import("quantize.zig");
const Input = input_file.Input;
const Status = abi.Status;
const fail = @import("status.zig").fail;

pub fn quantized_bytes(format_code: u32, rows: u64, dim: u32, out: *u64) callconv(.c) Status {
    out.* = 0;
    const half = half_of(format_code, dim, 0) catch |err| return fail(err);
    out.* = quantize_file.bytes(half, rows) catch |err| return fail(err);
    return .ok;
}

pub fn quantize(
    format_code: u32,
    rotate: u32,
    source: [*]const f32,
    rows: u64,
    dim: u32,
    target: [*]u8,
) callconv(.c) Status {
    const half = half_of(format_code, dim, rotate) catch |err| return fail(err);
    const input: Input = .{
        .name = "x",
        .base = @intFromPtr(source),
        .dtype = .f32,
        .token_stride = dim,
        .head_stride = dim,
        .dim = dim,
    };
    input.validate(rows, 1, input_file.limit_of(half)) catch |err| return fail(err);
    const row = gpa.alignedAlloc(f32, .@"64", half.dim_stored()) catch |err| return fail(err);
    defer gpa.free(row);
    quantize_file.pack(half, source, @intCast(rows), target, row);
    return .ok;
}

pub fn dequantize(
    format_code: u32,
    rotate: u32,
    source: [*]const u8,
    rows: u64,
    dim: u32,
    target: [*]f32,
) callconv(.c) Status {
    const half = half_of(format_code, dim, rotate) catch |err| return fail(err);
    const row = gpa.alignedAlloc(f32, .@"64", half.dim_stored()) catch |err| return fail(err);
    defer gpa.free(row);
    quantize_file.unpack(half, source, @intCast(rows), target, row);
    return .ok;
}

fn half_of(format_code: u32, dim: u32, rotate: u32) error{InvalidArgument}!format.Half {
    const f = try config_file.choice(abi.Format, "format", format_code);
    if (dim == 0 or dim > 1 << 24) {
        message.set("dim is {d}; expected 1 to {d}", .{ dim, 1 << 24 });
        return error.InvalidArgument;
    }
    return quantize_file.half_of(f, dim, rotate != 0);
}
