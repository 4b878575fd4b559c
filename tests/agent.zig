//! Calls a kvz library for a host that cannot load it: one of another CPU, under qemu, or of
//! another system, under Wine. tests/foreign.py starts it with the library's path and talks to it
//! through its standard input and output, everything little-endian:
//!
//!     'c' u8 name, arguments of u64 each   a call, answered by a u64
//!     'r' u64 pointer, u64 bytes           answered by these bytes
//!     'w' u64 pointer, u64 bytes, bytes    not answered
//!
//! Signatures come from abi.zig by reflection, as everywhere.
const std = @import("std");
const builtin = @import("builtin");
const abi = @import("abi");

const windows = builtin.os.tag == .windows;

pub fn main(init: std.process.Init.Minimal) !void {
    const library = try open(init);
    while (true) {
        var kind: [1]u8 = undefined;
        if (!try receive(&kind)) return;
        switch (kind[0]) {
            'c' => try call(library),
            'r' => {
                const memory = try region();
                try send(memory);
            },
            'w' => {
                const memory = try region();
                if (!try receive(memory)) return error.EndOfInput;
            },
            else => return error.UnknownRequest,
        }
    }
}

fn region() ![]u8 {
    const pointer: [*]u8 = @ptrFromInt(@as(usize, @intCast(try word())));
    return pointer[0..@intCast(try word())];
}

fn word() !u64 {
    var bytes: [8]u8 = undefined;
    if (!try receive(&bytes)) return error.EndOfInput;
    return std.mem.readInt(u64, &bytes, .little);
}

/// Reads the name and arguments of a function, calls it and sends its result.
fn call(library: Library) !void {
    @setEvalBranchQuota(10_000);
    var buffer: [64]u8 = undefined;
    if (!try receive(buffer[0..1])) return error.EndOfInput;
    const name = buffer[0..@min(buffer[0], buffer.len)];
    if (!try receive(name)) return error.EndOfInput;
    inline for (@typeInfo(abi).@"struct".decl_names) |declared| {
        const Function = @TypeOf(@field(abi, declared));
        if (@typeInfo(Function) == .@"fn" and std.mem.eql(u8, declared, name)) {
            const address = symbol(library, "kvz_" ++ declared) orelse return error.NoSuchSymbol;
            const function: *const Function = @ptrCast(@alignCast(address));
            var arguments: std.meta.ArgsTuple(Function) = undefined;
            inline for (&arguments) |*argument| {
                argument.* = from_word(@TypeOf(argument.*), try word());
            }
            const result = to_word(@call(.auto, function, arguments));
            return send(&std.mem.toBytes(std.mem.nativeToLittle(u64, result)));
        }
    }
    return error.NoSuchFunction;
}

fn from_word(comptime T: type, bits: u64) T {
    return switch (@typeInfo(T)) {
        .int => |i| @bitCast(@as(@Int(.unsigned, i.bits), @truncate(bits))),
        .float => |f| @bitCast(@as(@Int(.unsigned, f.bits), @truncate(bits))),
        .pointer, .optional => @ptrFromInt(@as(usize, @intCast(bits))),
        else => @compileError("type cannot cross the ABI: " ++ @typeName(T)),
    };
}

fn to_word(result: anytype) u64 {
    return switch (@typeInfo(@TypeOf(result))) {
        .void => 0,
        .int => @intCast(result),
        .@"enum" => @bitCast(@as(i64, @backingInt(result))),
        .pointer, .optional => @intFromPtr(result),
        else => @compileError("type cannot cross the ABI: " ++ @typeName(@TypeOf(result))),
    };
}

// ---- the system ----

const Library = *anyopaque;
const libc = struct {
    extern "c" fn dlopen(path: [*:0]const u8, mode: c_int) ?Library;
    extern "c" fn dlsym(library: Library, name: [*:0]const u8) ?*anyopaque;
    extern "c" fn read(file: c_int, bytes: [*]u8, count: usize) isize;
    extern "c" fn write(file: c_int, bytes: [*]const u8, count: usize) isize;
};
const kernel32 = struct {
    extern "kernel32" fn LoadLibraryA(path: [*:0]const u8) callconv(.winapi) ?Library;
    extern "kernel32" fn GetProcAddress(
        library: Library,
        name: [*:0]const u8,
    ) callconv(.winapi) ?*anyopaque;
    extern "kernel32" fn GetStdHandle(which: u32) callconv(.winapi) *anyopaque;
    extern "kernel32" fn ReadFile(
        file: *anyopaque,
        bytes: [*]u8,
        count: u32,
        done: *u32,
        overlapped: ?*anyopaque,
    ) callconv(.winapi) c_int;
    extern "kernel32" fn WriteFile(
        file: *anyopaque,
        bytes: [*]const u8,
        count: u32,
        done: *u32,
        overlapped: ?*anyopaque,
    ) callconv(.winapi) c_int;
};

fn open(init: std.process.Init.Minimal) !Library {
    if (windows) return kernel32.LoadLibraryA("kvz.dll") orelse error.CannotLoad;
    const argv = init.args.vector;
    if (argv.len != 2) return error.ExpectedLibrary;
    const now = 2;
    return libc.dlopen(argv[1], now) orelse error.CannotLoad;
}

fn symbol(library: Library, name: [*:0]const u8) ?*anyopaque {
    return if (windows) kernel32.GetProcAddress(library, name) else libc.dlsym(library, name);
}

/// Fills `bytes`; false if the input ended before the first of them.
fn receive(bytes: []u8) !bool {
    var at: usize = 0;
    while (at < bytes.len) {
        const count = try read_some(bytes[at..]);
        if (count == 0) return if (at == 0) false else error.EndOfInput;
        at += count;
    }
    return true;
}

fn send(bytes: []const u8) !void {
    var at: usize = 0;
    while (at < bytes.len) at += try write_some(bytes[at..]);
}

const once_max = 1 << 20;
const standard_input: u32 = @bitCast(@as(i32, -10));
const standard_output: u32 = @bitCast(@as(i32, -11));

fn read_some(bytes: []u8) !usize {
    if (windows) {
        var done: u32 = 0;
        const file = kernel32.GetStdHandle(standard_input);
        const count: u32 = @intCast(@min(bytes.len, once_max));
        // A closed pipe is the end of the input.
        return if (kernel32.ReadFile(file, bytes.ptr, count, &done, null) == 0) 0 else done;
    }
    const count = libc.read(0, bytes.ptr, bytes.len);
    return if (count < 0) error.CannotRead else @intCast(count);
}

fn write_some(bytes: []const u8) !usize {
    if (windows) {
        var done: u32 = 0;
        const file = kernel32.GetStdHandle(standard_output);
        const count: u32 = @intCast(@min(bytes.len, once_max));
        const good = kernel32.WriteFile(file, bytes.ptr, count, &done, null) != 0;
        return if (good) done else error.CannotWrite;
    }
    const count = libc.write(1, bytes.ptr, bytes.len);
    return if (count < 0) error.CannotWrite else @intCast(count);
}
