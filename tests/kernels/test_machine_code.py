"""Faults of compiled kernels are found in their disassembly."""

from tests.kernels.machine_code import lost_registers


def test_registers_that_nothing_writes_are_found() -> None:
    code = """
        /*0030*/                   UMOV UR5, 0x400 ;
        /*1870*/                   UIADD3 UR11, UR5, 0x4000, URZ ;
        /*18a0*/                   UIADD3 UR38, UP0, UR38, 0x40, URZ ;
        /*1b80*/                   UIADD3.64 UR22, UR38, 0x2, URZ ;
        /*2040*/              @!P4 LDG.E.128 R88, desc[UR22][R26.64] ;
        /*2ad0*/                   HGMMA.64x64x16.F16 R40, R56, gdesc[UR20], RZ, !UPT ;
        /*2af0*/                   HGMMA.64x64x16.F16 R40, gdesc[UR20], R40 ;
        /*3000*/                   EXIT ;
    """
    assert lost_registers(code) == [
        "UIADD3 UR38, UP0, UR38, 0x40, URZ",
        "HGMMA.64x64x16.F16 R40, gdesc[UR20], R40",
    ]
