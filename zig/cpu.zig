//! What this CPU can do, asked of the CPU or the operating system; no libc, no allocation. Called
//! by dispatch.zig.
const std = @import("std");
const builtin = @import("builtin");

pub fn has_x86_64_v3() bool {
    return x86_levels().v3;
}

/// x86-64-v4 with AVX512-VNNI.
pub fn has_x86_64_v4_vnni() bool {
    return x86_levels().v4_vnni;
}

pub fn has_dotprod() bool {
    if (builtin.cpu.arch != .aarch64) return false;
    return switch (builtin.os.tag) {
        .linux => getauxval(std.elf.AT.HWCAP) & hwcap_asimddp != 0,
        .windows => IsProcessorFeaturePresent(pf_arm_v82_dp) != 0,
        else => true, // every Apple Silicon Mac
    };
}

/// libc's: the one in std.os.linux knows nothing in a library, whose host has started the process.
extern "c" fn getauxval(kind: usize) usize;
const hwcap_asimddp = 1 << 20;
const pf_arm_v82_dp = 43;
extern "kernel32" fn IsProcessorFeaturePresent(feature: u32) callconv(.winapi) c_int;

const Levels = struct { v3: bool, v4_vnni: bool };

fn x86_levels() Levels {
    if (builtin.cpu.arch != .x86_64) return .{ .v3 = false, .v4_vnni = false };
    const highest = cpuid(0, 0).eax;
    const basic = cpuid(1, 0);
    const extended: Leaf = if (highest >= 7) cpuid(7, 0) else .{
        .eax = 0,
        .ebx = 0,
        .ecx = 0,
        .edx = 0,
    };
    const amd = cpuid(0x8000_0001, 0);
    const xsave = has_all(basic.ecx, &.{27});
    const saved = if (xsave) xgetbv() else 0; // register state the operating system saves
    const v3 = has_all(saved, &.{ 1, 2 }) and
        has_all(
            basic.ecx,
            &.{ 0, 9, 12, 13, 19, 20, 22, 23, 28, 29 },
        ) and // sse3 .. sse4.2 fma movbe avx f16c
        has_all(extended.ebx, &.{ 3, 5, 8 }) and // bmi1 avx2 bmi2
        has_all(amd.ecx, &.{5}); // lzcnt
    const v4_vnni = v3 and has_all(saved, &.{ 5, 6, 7 }) and
        has_all(extended.ebx, &.{ 16, 17, 28, 30, 31 }) and // avx512 f dq cd bw vl
        has_all(extended.ecx, &.{11}); // vnni
    return .{ .v3 = v3, .v4_vnni = v4_vnni };
}

fn has_all(register: u32, comptime bits: []const u5) bool {
    comptime var mask: u32 = 0;
    inline for (bits) |bit| mask |= 1 << bit;
    return register & mask == mask;
}

const Leaf = struct { eax: u32, ebx: u32, ecx: u32, edx: u32 };

fn cpuid(leaf: u32, subleaf: u32) Leaf {
    var eax: u32 = undefined;
    var ebx: u32 = undefined;
    var ecx: u32 = undefined;
    var edx: u32 = undefined;
    asm volatile ("cpuid"
        : [_] "={eax}" (eax),
          [_] "={ebx}" (ebx),
          [_] "={ecx}" (ecx),
          [_] "={edx}" (edx),
        : [_] "{eax}" (leaf),
          [_] "{ecx}" (subleaf),
    );
    return .{ .eax = eax, .ebx = ebx, .ecx = ecx, .edx = edx };
}

fn xgetbv() u32 {
    return asm volatile ("xgetbv"
        : [_] "={eax}" (-> u32),
        : [_] "{ecx}" (@as(u32, 0)),
        : .{ .edx = true });
}

test "levels are nested" {
    const levels = x86_levels();
    try std.testing.expect(levels.v3 or !levels.v4_vnni);
}
