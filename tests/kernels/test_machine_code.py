"""Faults of compiled kernels are found in their disassembly."""

from tests.kernels.machine_code import lost_registers, overwritten_factors


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


def test_factors_that_a_loop_overwrites_are_found() -> None:
    code = """
        /*3160*/                   LDSM.16.M88.4 R116, [R160+0x5000] ;
        /*31c0*/                   LDSM.16.M88.4 R104, [R160+0x6000] ;
.L_x_12:
        /*3c00*/                   LDSM.16.M88.4 R108, [R161] ;
        /*3d30*/                   HGMMA.64x32x16.F16 R96, R116, gdesc[UR52], RZ, !UPT ;
        /*3d40*/                   HGMMA.64x32x16.F16 R88, R108, gdesc[UR52], RZ, !UPT ;
        /*3d50*/                   HGMMA.64x32x16.F16 R80, R104, gdesc[UR52], RZ, !UPT, gsb0 ;
        /*4090*/              @!P0 BRA `(.L_x_10) ;
        /*46b0*/                   FADD R117, R112, R113 ;
        /*46c0*/                   FADD R109, R112, R113 ;
.L_x_10:
        /*5540*/                   BRA `(.L_x_12) ;
        /*5550*/                   EXIT ;
    """
    assert overwritten_factors(code) == ["HGMMA.64x32x16.F16 R96, R116, gdesc[UR52], RZ, !UPT"]
