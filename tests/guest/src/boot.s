# Ring 0, all of it: the two entries, the tables of the processor, and the gates by which ring 3 is left and entered.
# A host with software-only KVM emulates ring 0 at about 1.5 million instructions a second, so this is as short as it
# can be: page tables come ready-made with the image, and ring 3 (main.rs), to which every page is open, fills the IDT.

.set SERIAL, 0x3f8
.set CR4_VALUE, 0x620                 # PAE, OSFXSR, OSXMMEXCPT
.set CR0_VALUE, 0x80000033            # PG, NE, ET, MP, PE
.set MSR_EFER, 0xc0000080
.set SERVICE, 0x5e641ce
.set USER_FLAGS, 0x3002             # IOPL 3 (some hosts look at it, some at the bitmap of the TSS)
.set KERNEL_CODE, 0x08
.set USER_CODE, 0x1b
.set USER_DATA, 0x23
.set FIRST_TSS, 0x28
.set CPU_AREA, 0x2000           # one processor's: TSS at 0, ring-0 stack below 0x1000, ring-3 stack below 0x2000
.set TSS_BITMAP, 104
.set TSS_LIMIT, TSS_BITMAP + 512

.section .note.Xen, "a", @note
    .long 4, 8, 18              # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_entry

.section .text.boot, "ax"

# The 64-bit Linux boot protocol: long mode, flat segments, the first GiB mapped one to one, rsi = boot_params.
.code64
.globl linux_entry
linux_entry:
    mov edx, SERIAL
    mov al, 10
    out dx, al
    xor edi, edi
    mov eax, offset pml4
    mov cr3, rax
    mov eax, CR4_VALUE
    mov cr4, rax
    mov eax, CR0_VALUE
    mov cr0, rax
    jmp long_mode

# PVH: 32-bit protected mode without paging, ebx = hvm_start_info.
.code32
pvh_entry:
    mov edx, SERIAL
    mov al, 10
    out dx, al
    mov edi, 1
    mov esi, ebx
    mov eax, CR4_VALUE
    mov cr4, eax
    mov eax, offset pml4
    mov cr3, eax
    mov ecx, MSR_EFER
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, CR0_VALUE
    mov cr0, eax
    lgdt [gdt_pointer]
    .byte 0xea                  # far jump
    .long long_mode
    .word KERNEL_CODE

# Both roads meet: edi = 0 (boot_params) or 1 (hvm_start_info), esi = its address.
.code64
long_mode:
    lgdt [rip + gdt_pointer]
    lidt [rip + idt_pointer]
    mov ebx, offset cpu_areas
    lea rsp, [rbx + 0x1000]
    mov [rbx + 4], rsp
    mov dword ptr [rbx + 100], TSS_BITMAP << 16
    mov byte ptr [rbx + TSS_LIMIT], 0xff
    mov ecx, ebx                # base 23:0 and 31:24 go to bits 39:16 and 63:56 of the descriptor
    and ecx, 0xffffff
    shl rcx, 16
    movabs rax, 0x890000000000 + TSS_LIMIT
    or rax, rcx
    shr ebx, 24
    shl rbx, 56
    or rax, rbx
    mov [rip + gdt + FIRST_TSS], rax
    mov ax, FIRST_TSS
    ltr ax
    mov eax, offset first_stack_top
    mov ecx, offset ring3_main

# To ring 3: rip = rcx, rsp = rax, rdi and rsi are the arguments. A function expects a return address below it.
to_ring3:
    sub rax, 8
    push USER_DATA
    push rax
    push USER_FLAGS
    push USER_CODE
    push rcx
    iretq

# What ring 3 may ask for, by UD2 with SERVICE in r11d and the number in eax. An exception is what every host delivers:
# software-only KVM does not know INT n in long mode.
invalid_opcode:
    cmp r11d, SERVICE
    jne plain_exception
    add qword ptr [rsp + 16], 2 # past UD2
    add rsp, 16                 # the error code and the vector
    cmp eax, 1
    jb halt
    je wait
    cmp eax, 3
    jb let_in
    je shut_out
    cmp eax, 5
    jb read_msr
    je write_msr
    cmp eax, 6
    je read_cpuid
triple_fault:                   # 7, and anything else
    lidt [rip + null_pointer]
    ud2
halt:                           # 0: halt for ever
    cli
    hlt
    jmp halt
wait:                           # 1: halt until an interrupt
    sti
    hlt
    cli
    iretq
let_in:                         # 2: let interrupts in
    or dword ptr [rsp + 16], 0x200
    iretq
shut_out:                       # 3: shut them out
    and dword ptr [rsp + 16], 0xfffffdff
    iretq
read_msr:                       # 4: MSR ecx into edx:eax
    rdmsr
    iretq
write_msr:                      # 5: edx:esi into MSR ecx
    mov eax, esi
    wrmsr
    iretq
read_cpuid:                     # 6: leaf esi, subleaf ecx
    mov eax, esi
    cpuid
    iretq

# Exceptions: the facts go to `exception_facts`, and ring 3 (main.rs) prints them. A second one ends the machine at once.
.balign 16
.globl exception_gates
exception_gates:
.set vector, 0
.rept 32
    .balign 16
    .if (vector != 8) && (vector != 10) && (vector != 11) && (vector != 12) && (vector != 13) && (vector != 14) && (vector != 17) && (vector != 21)
    push 0
    .endif
    push vector
    jmp exception_common
    .set vector, vector + 1
.endr
exception_common:
    cmp dword ptr [rsp], 6
    je invalid_opcode
    cmp dword ptr [rsp], 2
    je non_maskable
plain_exception:
    mov eax, 1
    xchg eax, [rip + exception_seen]
    test eax, eax
    jnz triple_fault
    pop [rip + exception_facts]
    pop [rip + exception_facts + 8]
    mov rax, [rsp]
    mov [rip + exception_facts + 16], rax
    mov rax, cr2
    mov [rip + exception_facts + 24], rax
    mov eax, offset exception_stack_top
    mov ecx, offset ring3_exception
    jmp to_ring3

# A non-maskable interrupt: the mode `reboot` sends itself one to restart the machine from here, where the next is masked.
non_maskable:
    mov al, 0xfe
    out 0x64, al
    hlt
    jmp non_maskable

# Interrupts 0x20 to 0x3f: count, acknowledge the virtio-mmio device if `interrupt_device` names one, end of interrupt.
.balign 16
.globl interrupt_gates
interrupt_gates:
.set vector, 0
.rept 32
    .balign 16
    push rax
    mov eax, vector
    jmp interrupt_common
    .set vector, vector + 1
.endr
interrupt_common:
    push rbx
    inc dword ptr [interrupt_count + rax * 4]
    mov rbx, [interrupt_device + rax * 8]
    test rbx, rbx
    jz acknowledged
    mov eax, [rbx + 0x60]
    mov [rbx + 0x64], eax
acknowledged:
    mov ebx, 0xfee000b0
    mov dword ptr [rbx], 0
    pop rbx
    pop rax
    iretq

.balign 16
.globl spurious_gate
spurious_gate:
    iretq

# Where an application processor begins, in real mode, after ring 3 copied it to a page below 1 MiB.
.balign 16
.globl ap_begin
.globl ap_end
.code16
ap_begin:
    cli
    mov ax, cs
    mov ds, ax
    mov eax, CR4_VALUE
    mov cr4, eax
    mov eax, offset pml4
    mov cr3, eax
    mov ecx, MSR_EFER
    rdmsr
    or eax, 0x100
    wrmsr
    .byte 0x66, 0x0f, 0x01, 0x16 # LGDT with a 32-bit base
    .word ap_gdt_pointer - ap_begin
    mov eax, CR0_VALUE
    mov cr0, eax
    .byte 0x66, 0xea            # far jump with a 32-bit offset
    .long ap_long_mode
    .word KERNEL_CODE
ap_gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
ap_end:
.code64
ap_long_mode:
    mov edi, 1
    lock xadd [rip + ap_count], edi
    lidt [rip + idt_pointer]
    imul ebx, edi, CPU_AREA
    add ebx, offset cpu_areas
    lea rsp, [rbx + 0x1000]
    lea rax, [rbx + 0x2000]
    mov ecx, edi
    shl ecx, 4
    add ecx, FIRST_TSS
    ltr cx
    mov ecx, offset ring3_ap
    jmp to_ring3

# 4 GiB one to one in 2 MiB pages, open to ring 3, accessed and dirty from the start.
.section .tables, "aw"
.balign 4096
pml4:
    .quad pdpt + 7
    .skip 4088
pdpt:
    .quad pages + 0x0007, pages + 0x1007, pages + 0x2007, pages + 0x3007
    .skip 4064
pages:
.set page, 0
.rept 2048
    .quad (page << 21) + 0xe7
    .set page, page + 1
.endr

.globl gdt
gdt:
    .quad 0
    .quad 0x00af9b000000ffff    # 0x08 ring-0 code
    .quad 0x00cf93000000ffff    # 0x10 ring-0 data
    .quad 0x00affb000000ffff    # 0x18 ring-3 code
    .quad 0x00cff3000000ffff    # 0x20 ring-3 data
    .skip 16 * 256              # 0x28 + 16 n: the TSS of processor n
gdt_end:
    .balign 8
    .skip 6
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
    .skip 6
idt_pointer:
    .word 16 * 256 - 1
    .quad idt
    .skip 6
null_pointer:
    .word 0
    .quad 0
.globl ap_count
    .balign 4
ap_count:
    .long 1

.section .bss.boot, "aw", @nobits
.balign 4096
.globl cpu_areas
cpu_areas:
    .skip 256 * CPU_AREA
.globl idt
idt:
    .skip 16 * 256
    .skip 0x20000
first_stack_top:
    .skip 0x2000
exception_stack_top:
.globl exception_facts
exception_facts:
    .skip 32
exception_seen:
    .skip 8
.globl interrupt_count
interrupt_count:
    .skip 4 * 32
.globl interrupt_device
interrupt_device:
    .skip 8 * 32
