# What bench/hashes measured (`table`, a CSV of kind,name,at,value,unit) as one picture of three parts (`picture`, an SVG).
set terminal svg size 960,1560 dynamic background "white" font "sans-serif,15" enhanced
set output picture
set datafile separator ","
of(kind, name) = sprintf("< grep '^%s,%s,' '%s'", kind, name, table)
figure(kind, name) = real(system(sprintf("grep -m 1 '^%s,%s,' '%s' | cut -d, -f4", kind, name, table)))
mib = int(system(sprintf("grep -m 1 '^full,' '%s' | cut -d, -f3", table)) / 1048576)
region = mib % 1024 ? sprintf("%d MiB", mib) : sprintf("%d GiB", mib / 1024)

array colour[8] = ["#0072b2", "#56b4e9", "#009e73", "#e69f00", "#000000", "#999999", "#d55e00", "#cc79a7"]
array algorithm[8] = ["XXH3-64", "XXH3-128", "XXH64", "CRC32C", "MD5", "SHA-1", "SHA-256", "BLAKE2b"]
array shade[5] = ["#e69f00", "#0072b2", "#56b4e9", "#999999", "#d55e00"]
array bits[5] = ["32", "64", "128", "160", "256"]
array whose[5] = ["CRC32C", "XXH3-64, XXH64", "XXH3-128, MD5", "SHA-1", "SHA-256"]

set grid lc rgb "#dddddd"
set border 3
set tics nomirror
set key outside right center Left reverse samplen 2 spacing 1.3
set rmargin 34
set lmargin 12
set multiplot layout 3,1 spacing 0,0.08

set title "Speed of hashing, warm memory, one core"
set logscale x 2
set logscale y 10
set xlabel "block size (bytes)"
set ylabel "speed (GB per CPU second)"
set xrange [64:1048576]
set xtics ("64" 64, "256" 256, "1 KiB" 1024, "4 KiB" 4096, "16 KiB" 16384, "64 KiB" 65536, "256 KiB" 262144, "1 MiB" 1048576)
set yrange [0.2:40]
set ytics ("0.2" 0.2, "0.5" 0.5, "1" 1, "2" 2, "5" 5, "10" 10, "20" 20, "40" 40)
set arrow 1 from 4096, graph 0 to 4096, graph 1 nohead dt 2 lc rgb "#666666"
set label 1 "a page" at 4096, graph 0.03 offset 0.7,0 tc rgb "#666666"
plot for [i=1:8] of("speed", algorithm[i]) using 3:4 with linespoints lw 2 pt 7 ps 0.4 lc rgb colour[i] title algorithm[i]
unset arrow 1
unset label 1

set title "Any two of a region's different 4 KiB pages have the same digest (birthday bound)"
set xlabel "region size"
set ylabel "probability"
set xrange [2**30:2**40]
set xtics ("1 GiB" 2**30, "4 GiB" 2**32, "16 GiB" 2**34, "64 GiB" 2**36, "256 GiB" 2**38, "1 TiB" 2**40)
set yrange [1e-70:10]
set ytics ("1" 1, "10^{-10}" 1e-10, "10^{-20}" 1e-20, "10^{-30}" 1e-30, "10^{-40}" 1e-40, "10^{-50}" 1e-50, "10^{-60}" 1e-60, "10^{-70}" 1e-70)
plot for [i=1:5] of("collision", bits[i]) using 3:4 with linespoints lw 2 pt 7 ps 0.4 lc rgb shade[i] title sprintf("%s bits: %s", bits[i], whose[i])

set title sprintf("Finding and comparing the changes of %s in memory", region)
unset logscale x
set xlabel "dirty pages (% of the region, spread evenly)"
set ylabel "CPU time (ms)"
set xrange [-0.2:5.2]
set xtics ("0" 0, "0.01" 1, "0.1" 2, "1" 3, "10" 4, "100" 5)
set yrange [0.001:10000]
set ytics ("0.001" 0.001, "0.01" 0.01, "0.1" 0.1, "1" 1, "10" 10, "100" 100, "1000" 1000, "10000" 10000)
plot figure("full", "MD5") with lines lw 2 dt 2 lc rgb colour[5] title "all of it by MD5", \
    figure("full", "SHA-256") with lines lw 2 dt 2 lc rgb colour[7] title "all of it by SHA-256", \
    figure("full", "XXH3-128") with lines lw 2 dt 2 lc rgb colour[2] title "all of it by XXH3-128", \
    of("detect", "scan and hash") using 0:4 with linespoints lw 2 pt 7 ps 0.5 lc rgb colour[1] title "scan, hash what it names", \
    of("detect", "scan") using 0:4 with linespoints lw 2 pt 7 ps 0.5 lc rgb colour[3] title "PAGEMAP\\_SCAN", \
    of("detect", "stores armed") every ::1 using ($0 + 1):4 with linespoints lw 2 pt 7 ps 0.5 lc rgb colour[4] title "the stores, tracked", \
    of("detect", "stores") every ::1 using ($0 + 1):4 with linespoints lw 2 pt 7 ps 0.5 lc rgb colour[6] title "the stores, untracked"
unset multiplot
