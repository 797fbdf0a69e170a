// SPDX-License-Identifier: Apache-2.0

package docs

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v4"

	"github.com/culvert-mesh/culvert/privilege"
)

func TestMain(m *testing.M) {
	if name := filepath.Base(os.Args[0]); name == "systemctl" || name == "journalctl" || name == "scp" {
		if err := standIn(name, os.Args[1:]); err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// The quickstart, from the first command to the last, on two machines. What it does
// by systemctl is done by what the installed unit says.
func TestQuickstart(t *testing.T) {
	newLand(t, "node-1", "node-2").follow(read(t, "docs/quickstart.md", ""))
}

// The README's first configuration, on one machine. The line of the access log that
// it shows has the fields of the first one that is written.
func TestFirstConfiguration(t *testing.T) {
	l := newLand(t, "node-1")
	m := l.machines["node-1"]
	m.do("make build")
	blocks := read(t, "README.md", "A first configuration")
	shown := slices.IndexFunc(blocks, func(b block) bool { return b.lang == "json" })
	if shown < 0 {
		t.Fatal("it shows no line of the access log")
	}
	l.follow(blocks[:shown])
	if diff := cmp.Diff(fields(t, blocks[shown].text), fields(t, m.do("head -n 1 /tmp/first/access.log"))); diff != "" {
		t.Errorf("%s: -shown +written\n%s", blocks[shown], diff)
	}
	l.follow(blocks[shown:])
}

// fields are the names in a line of JSON, in order.
func fields(t *testing.T, line string) []string {
	t.Helper()
	var n yaml.Node // JSON is YAML, and this keeps the order
	if err := yaml.Load([]byte(strings.TrimSpace(line)), &n); err != nil {
		t.Fatalf("%v in %s", err, line)
	}
	var out []string
	for i, m := 0, n.Content[0]; i < len(m.Content); i += 2 {
		out = append(out, m.Content[i].Value)
	}
	return out
}

// What the page of the configuration shows is a configuration, and its commands
// run.
func TestConfigurationPage(t *testing.T) {
	l := newLand(t, "node-1")
	m := l.machines["node-1"]
	m.do("make build && make install")
	shown := map[string]bool{}
	for _, b := range read(t, "docs/configuration.md", "") {
		key, _, _ := strings.Cut(b.text, ":")
		file := map[string]string{"workloads": "workloads", "pods": "pods", "rules": "policy", "modes": "policy", "trust": "trust"}[key]
		switch {
		case b.lang == "sh":
			m.show(b)
		case b.lang == "yaml" && file == "":
			t.Errorf("%s: of which file it is, this test does not know", b)
		case b.lang == "yaml":
			shown[key] = true
			b.text = fmt.Sprintf("# /etc/culvert/%s.yaml:\n%s", file, b.text)
			m.write(b)
			if key == "trust" {
				m.do("echo 'identity: {trustFile: trust.yaml}' >>/etc/culvert/config.yaml; ztunnel ca init --dir partner --trust-domain partner.example; cp partner/root.pem /etc/culvert/partner-root.pem")
			}
			if out := m.do("ztunnel config --check"); !strings.Contains(out, file+".yaml: good") {
				t.Errorf("%s is not good: %s", b, out)
			}
		}
	}
	if len(shown) != 5 {
		t.Errorf("it shows files with %v only", slices.Sorted(maps.Keys(shown)))
	}
}

// SECURITY.md has each capability that the daemon asks for, with its reason.
func TestSecurityHasTheCapabilities(t *testing.T) {
	page, err := os.ReadFile("../../SECURITY.md")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, c := range privilege.Needed() {
		names = append(names, c.Name)
		if row := fmt.Sprintf("| %s | %s |", c.Name, c.Reason); !strings.Contains(string(page), row) {
			t.Errorf("it has no row %s", row)
		}
	}
	if unit := "`CapabilityBoundingSet=" + strings.Join(names, " ") + "`"; !strings.Contains(string(page), unit) {
		t.Errorf("it does not say %s", unit)
	}
}

// The unit leaves the daemon what the daemon asks for, and no more. That it suffices
// is seen by TestQuickstart.
func TestUnitHasTheCapabilities(t *testing.T) {
	unit, err := readUnit("../../deploy/systemd/culvert.service")
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for _, c := range privilege.Needed() {
		want = append(want, c.Name)
	}
	if diff := cmp.Diff(want, strings.Fields(unit["CapabilityBoundingSet"])); diff != "" {
		t.Errorf("-needed +of the unit\n%s", diff)
	}
}

// TestInstall: where things go, that an operator's files stay, that systemd takes the
// unit.
func TestInstall(t *testing.T) {
	l := newLand(t, "node-1")
	m := l.machines["node-1"]
	const list = "cd /tmp/pkg && find . -not -path '*/doc/culvert/*' -type f -printf '%m %P\\n' | sort -k2; cd /mnt/culvert"

	if out, failed := m.run("make install DESTDIR=/tmp/pkg"); failed == "" || !strings.Contains(out, "run make build first") {
		t.Errorf("without anything to install: %s", out)
	}
	m.do("mkdir bin; cp /bin/true bin/ztunnel; make install DESTDIR=/tmp/pkg PREFIX=/usr")
	want := `644 etc/culvert/config.yaml
644 etc/culvert/pods.yaml
644 etc/culvert/policy.yaml
644 etc/culvert/workloads.yaml
755 usr/bin/ztunnel
644 usr/lib/systemd/system/culvert.service
`
	if diff := cmp.Diff(want, strings.TrimSpace(m.do(list))+"\n"); diff != "" {
		t.Errorf("installed: -want +got\n%s", diff)
	}
	if out := m.do("grep ^ExecStart= /tmp/pkg/usr/lib/systemd/system/culvert.service; stat -c %a /tmp/pkg/var/lib/culvert"); !strings.Contains(out, "ExecStart=/usr/bin/ztunnel run --config /etc/culvert/config.yaml\n700\n") {
		t.Errorf("the unit, and the folder for keys: %s", out)
	}
	if out := m.do("echo mine >/tmp/pkg/etc/culvert/pods.yaml; make install DESTDIR=/tmp/pkg PREFIX=/usr; cat /tmp/pkg/etc/culvert/pods.yaml"); !strings.HasSuffix(strings.TrimSpace(out), "mine") {
		t.Errorf("a file of the operator's was not left alone: %s", out)
	}
	m.do("make uninstall DESTDIR=/tmp/pkg PREFIX=/usr")
	if out := m.do("find /tmp/pkg -type f -printf '%P\\n'"); strings.Contains(out, "ztunnel") || strings.Contains(out, ".service") || strings.Contains(out, ".md") || strings.Count(out, "etc/culvert/") != 4 {
		t.Errorf("uninstalled, there is: %s", out)
	}

	t.Run("as a package of Debian's", func(t *testing.T) {
		if _, err := exec.LookPath("dpkg-deb"); err != nil {
			t.Skip("dpkg-deb is not there")
		}
		out := m.do("make -o build deb; dpkg-deb -f out/culvert_*.deb Package; dpkg-deb -I out/culvert_*.deb conffiles; dpkg-deb -c out/culvert_*.deb")
		for _, want := range []string{"\nculvert\n", "\n/etc/culvert/pods.yaml\n", " ./usr/bin/ztunnel\n", "drwx------ root/root", " ./usr/share/doc/culvert/docs/quickstart.md\n"} {
			if !strings.Contains(out, want) {
				t.Errorf("it has no %q: %s", want, out)
			}
		}
	})
	t.Run("systemd takes the unit", func(t *testing.T) {
		if _, err := exec.LookPath("systemd-analyze"); err != nil {
			t.Skip("systemd-analyze is not there")
		}
		m.do("make install")
		verify := "systemd-analyze verify --man=no /tmp/culvert.service 2>&1"
		if out, _ := m.run("cp /usr/local/lib/systemd/system/culvert.service /tmp && " + verify); strings.TrimSpace(out) != "" {
			t.Errorf("it says: %s", out)
		}
		if out, _ := m.run("sed -i s/^KillMode/KillMod/ /tmp/culvert.service && " + verify); !strings.Contains(out, "KillMod") {
			t.Errorf("of a unit with a slip it says: %s", out)
		}
	})
}
