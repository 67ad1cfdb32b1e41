//! What is in files: holes, mappings, appends, copies, direct and large reads.

use super::*;

#[test]
fn sparse_files_and_fallocate() {
    let m = Mounted::new(CACHED);
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(m.at("f"))
        .unwrap();
    file.write_all_at(&[1; 4096], 1 << 20).unwrap();
    assert_eq!(lseek64(file.as_fd(), 0, Whence::SeekData), Ok(1 << 20));
    assert_eq!(
        lseek64(file.as_fd(), 1 << 20, Whence::SeekHole),
        Ok((1 << 20) + 4096)
    );
    assert_eq!(
        lseek64(file.as_fd(), 2 << 20, Whence::SeekData),
        Err(Errno::ENXIO)
    );
    fallocate(
        file.as_fd(),
        FallocateFlags::FALLOC_FL_KEEP_SIZE,
        0,
        8 << 20,
    )
    .unwrap();
    assert_eq!(file.metadata().unwrap().len(), (1 << 20) + 4096);
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(file.as_fd(), punch, 1 << 20, 4096).unwrap();
    let mut page = [1; 4096];
    file.read_exact_at(&mut page, 1 << 20).unwrap();
    assert_eq!(page, [0; 4096]);
    file.set_len(0).unwrap();
    assert_eq!(fs::metadata(m.host("f")).unwrap().len(), 0);
}

#[test]
fn ranges_are_copied_by_the_host() {
    let m = Mounted::new(CACHED);
    fs::write(m.at("a"), vec![7; 3 << 20]).unwrap();
    fs::copy(m.at("a"), m.at("b")).unwrap();
    assert_eq!(fs::read(m.host("b")).unwrap(), vec![7; 3 << 20]);
    let asked = m
        .engine
        .stats()
        .requests
        .iter()
        .any(|(name, _)| *name == "copy_file_range");
    assert!(asked, "the kernel had copy_file_range do it");
}

#[test]
fn mappings_shared_and_private() {
    for cache in [NO_CACHE, CACHED] {
        let m = Mounted::new(cache);
        fs::write(m.at("f"), vec![b'a'; 8192]).unwrap();
        let file = File::options()
            .read(true)
            .write(true)
            .open(m.at("f"))
            .unwrap();
        // An append handle must not turn the write-back of a mapping into an append.
        let _append = File::options().append(true).open(m.at("f")).unwrap();
        let shared = map(&file, libc::MAP_SHARED);
        let private = map(&file, libc::MAP_PRIVATE);
        private[0] = b'p';
        shared[5000] = b's';
        // SAFETY: the range is that of the mapping.
        let synced = unsafe { libc::msync(shared.as_mut_ptr().cast(), 8192, libc::MS_SYNC) };
        assert_eq!(synced, 0);
        let host = fs::read(m.host("f")).unwrap();
        assert_eq!((host.len(), host[0], host[5000]), (8192, b'a', b's'));
    }
}

#[test]
fn appends_land_at_the_end_that_the_host_knows() {
    let m = Mounted::new(CACHED);
    let mut guest = File::options()
        .append(true)
        .create(true)
        .open(m.at("log"))
        .unwrap();
    let mut host = File::options().append(true).open(m.host("log")).unwrap();
    for _ in 0..100 {
        guest.write_all(b"guest\n").unwrap();
        host.write_all(b"host\n").unwrap();
    }
    assert_eq!(fs::metadata(m.host("log")).unwrap().len(), 1100);
}

#[test]
fn direct_io_needs_no_alignment_of_the_host() {
    let m = Mounted::new(CACHED);
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .custom_flags(libc::O_DIRECT)
        .open(m.at("f"))
        .unwrap();
    file.write_all_at(&[9; 1000], 3).unwrap();
    let mut back = [0; 1000];
    file.read_exact_at(&mut back, 3).unwrap();
    assert_eq!(back, [9; 1000]);
}

#[test]
fn large_files_arrive_intact() {
    let m = Mounted::new(CACHED);
    let mut seed = 1_u64;
    let data: Vec<u8> = (0..(33 << 20) + 17)
        .map(|_| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 56) as u8
        })
        .collect();
    fs::write(m.at("big"), &data).unwrap();
    assert!(fs::read(m.host("big")).unwrap() == data);
    let mut file = File::open(m.at("big")).unwrap();
    file.seek(SeekFrom::Start((20 << 20) + 5)).unwrap();
    let mut tail = Vec::new();
    file.read_to_end(&mut tail).unwrap();
    assert!(tail == data[(20 << 20) + 5..]);
    let size = nix::sys::statvfs::statvfs(m.point.path()).unwrap();
    assert!(size.blocks() > 0 && size.name_max() == 255);
}
